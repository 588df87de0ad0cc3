"""`peftjax tune`: one method, one adapter folder."""

import argparse

import numpy as np

from peftjax import data
from peftjax.cli import _compare
from peftjax.cli._fit import Fitter, Settings, step_count
from peftjax.cli._recipes import chosen
from peftjax.cli._task import load_task


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    (recipe,) = chosen(options.method)
    settings = Settings(epochs=options.epochs, batch=options.batch, rate=options.rate)
    columns = {'text': options.text_column, 'label': options.label_column}
    shipped = data.default_messages()
    train = data.load_labelled(options.train, **columns) if options.train else shipped[0]
    test = shipped[1] if not options.train else None
    if options.test:
        test = data.load_labelled(options.test, names=train.names, **columns)
    if options.shots:
        train = data.few_shot(train, options.shots, options.seed)
    out = _compare.new_folder(options.out, options.overwrite)
    (out / 'adapters').rmdir()
    task = load_task(options.model, train.names, options.max_tokens)
    tokens, steps = task.encode(train.texts), step_count(len(train), settings)
    fitter = Fitter(task, recipe, settings, tokens.input_ids.shape[1], steps)
    _compare.say(str(fitter.peft))
    with _compare.progress(1 if recipe.probe else steps) as bar:
        fitted = fitter.fit(tokens, train.labels, options.seed, bar.update)
    metadata = _compare.describe(task, recipe, settings, options.seed)
    _compare.save(out, fitted, task, metadata)
    _compare.say(f'{fitted.steps} steps in {fitted.seconds:.1f} s; written to {out}')
    if test is not None:
        right = fitter.logits(fitted.phi, task.encode(test.texts)).argmax(-1) == test.labels
        _compare.say(f'accuracy on {len(test)} test messages: {100 * np.mean(right):.1f} %')
    return 0
