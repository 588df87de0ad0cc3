"""`peftjax tune`: one method, one adapter folder."""

import argparse
import pathlib

from peftjax import data, models
from peftjax.cli import _config, _output, _roads, _saved
from peftjax.cli._examples import read
from peftjax.cli._fit import Fitter, Settings, step_count
from peftjax.cli._recipes import chosen
from peftjax.cli._task import load_task
from peftjax.cli._terminal import progress, say
from peftjax.cli.language import _tune as language


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    if options.model and models.model_kind(options.model) == 'decoder':
        return language.run(options)
    _roads.settle(options, _roads.ENCODER, _roads.LANGUAGE)
    recipe, *more = chosen(options.method)
    if more:
        raise ValueError(f'tune takes one method; got {options.method!r}. compare takes several')
    out = _output.check_free(options.out, options.overwrite)
    train, test = read(options)
    if options.shots:
        train = data.few_shot(train, options.shots, options.seed)
    task = load_task(options.model, train.names, options.max_tokens)
    tokens = task.encode(train.texts)
    settings = Settings(epochs=options.epochs, batch=options.batch, rate=options.rate)
    steps = step_count(len(train), settings)
    fitter = Fitter(task, recipe, settings, tokens.input_ids.shape[1], steps)
    say(str(fitter.peft))
    with progress(1 if recipe.probe else steps) as bar:
        fitted = fitter.fit(tokens, train.labels, options.seed, bar.update)
    _saved.save(out, fitter, fitted, options.seed, options.overwrite)
    options.rate = fitter.settings.rate
    _config.write(beside(out), options)
    say(f'{fitted.steps} steps in {fitted.seconds:.1f} s; written to {out}')
    if test is not None:
        accuracy = fitter.accuracy(fitted.phi, task.encode(test.texts), test.labels)
        say(f'accuracy on {len(test)} test messages: {accuracy:.1f} %')
    return 0


def beside(out: pathlib.Path) -> pathlib.Path:
    """Where the options lie of a run whose folder is an adapter's, which takes no other file."""
    out = out.absolute()
    return out.with_name(f'{out.name}.{_config.FILE}')
