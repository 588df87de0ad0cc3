"""`peftjax compare`: which way of adapting this model is best on these examples?"""

import argparse
import pathlib
from typing import Any

import jax
import numpy as np

from peftjax import data
from peftjax.cli import _config, _output, _picture, _report, _saved, _whole
from peftjax.cli._examples import Sample, draw, read
from peftjax.cli._fit import Fitted, Fitter, Settings, step_count
from peftjax.cli._recipes import chosen
from peftjax.cli._task import Task, load_task
from peftjax.cli._terminal import progress, say
from peftjax.cli._watch import Watch


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    recipes = chosen(options.methods)
    out = _output.check_free(options.out, options.overwrite)
    train, test = read(options)
    if test is None:
        raise ValueError('compare needs test examples: --train goes with --test')
    task = load_task(options.model, train.names, options.max_tokens)
    samples = draw(task, train, options.shots, options.seeds)
    tokens = task.encode(test.texts)
    settings = Settings(epochs=options.epochs, batch=options.batch)
    say(
        f'{len(train.names)} labels, {options.shots} examples of each, seeds {options.seeds}; '
        f'{len(test)} test messages; {_size(task):,} parameters'
    )
    _output.clear(out)
    _config.write(out / _config.FILE, options)
    steps = step_count(len(samples[0].labels), settings)
    total = sum(1 if recipe.probe else steps for recipe in recipes) * len(samples)
    records = []
    with progress(total) as bar:
        for recipe in recipes:
            bar.set_description(recipe.name)
            fitter = Fitter(task, recipe, settings, samples[0].tokens.input_ids.shape[1], steps)
            records.append(_method(fitter, samples, tokens, test.labels, out, bar))
            bar.write(_report.line(records[-1]))
            _write(out, options, records)
    _show(out, options, records)
    return 0


def _method(
    fitter: Fitter,
    samples: list[Sample],
    tokens: data.Tokens,
    labels: np.ndarray,
    out: pathlib.Path,
    bar: Any,
) -> dict[str, Any]:
    """One method over all seeds, its adapters saved."""
    fits, accuracies, sizes = [], [], []
    for sample in samples:
        watch = Watch(fitter.recipe.name, fitter.rates, bar)
        examples, seed = (sample.tokens, sample.labels), sample.seed
        fitted = fitter.fit(examples, fitter.start(seed), fitter.batches(*examples, seed), watch)
        accuracies.append(fitter.accuracy(fitted.phi, tokens, labels))
        folder = out / _output.ADAPTERS / f'{fitter.recipe.name}-seed{sample.seed}'
        sizes.append(_saved.save(folder, fitter, fitted, sample.seed, overwrite=False))
        fits.append(fitted)
    return _record(fitter, fits, accuracies, sizes)


def _record(
    fitter: Fitter, fits: list[Fitted], accuracies: list[float], sizes: list[int]
) -> dict[str, Any]:
    """What the table, the picture and the JSON file say of one method."""
    mean, spread = _report.summary(accuracies)
    trained = fitter.peft.count()
    return {
        'method': fitter.recipe.name,
        'about': fitter.recipe.about,
        'learning_rate': fitter.settings.rate or None,
        'head_learning_rate': fitter.settings.head_rate or None,
        'trained_parameters': trained,
        'trained_percent': 100 * trained / _size(fitter.task),
        'bytes_on_disk': int(np.mean(sizes)),
        'train_seconds': float(np.mean([fit.seconds for fit in fits])),
        'compile_seconds': sum(fit.compile_seconds for fit in fits),
        'steps': fits[0].steps,
        'peak_bytes': max(fit.peak_bytes for fit in fits),
        'accuracy': accuracies,
        'accuracy_mean': mean,
        'accuracy_sd': spread,
    }


def _write(out: pathlib.Path, options: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    """Writes what is known, after each method: a run cut off keeps its finished methods."""
    what = {k: v for k, v in vars(options).items() if k not in ('out', 'overwrite', 'config')}
    content = {'options': what, 'versions': _report.versions(), 'methods': records}
    _report.write_json(out / 'results.json', content)
    _whole.write(out / 'table.txt', _report.table(records) + '\n')


def _show(out: pathlib.Path, options: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    """Prints the table and draws the picture."""
    say('\n' + _report.table(records))
    title = f'{options.shots} examples a label, seeds {", ".join(map(str, options.seeds))}'
    _picture.draw(out / 'accuracy.png', records, title)
    say(f'\nwritten to {out}: {", ".join(_output.RESULTS)}, {_output.ADAPTERS}/')


def _size(task: Task) -> int:
    """The number of parameters of the model."""
    return sum(leaf.size for leaf in jax.tree.leaves(task.params))
