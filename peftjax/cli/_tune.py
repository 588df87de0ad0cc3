"""`peftjax tune` on an encoder: one method, one folder with adapter and metrics."""

import argparse
from functools import partial
from typing import NamedTuple

from jax.sharding import Mesh

from peftjax import data, models
from peftjax.cli import _accumulate, _going, _mesh, _metrics, _roads, _run_folder, _saved
from peftjax.cli._examples import labelled, read
from peftjax.cli._fit import Fitter, Settings, step_count
from peftjax.cli._held import split
from peftjax.cli._loop import Evaluation
from peftjax.cli._recipes import chosen, settled
from peftjax.cli._task import Task, load_task
from peftjax.cli._terminal import say
from peftjax.cli.language import _tune as language


class Parts(NamedTuple):
    """Examples to train on, to evaluate on between steps, and to test on; None where none are."""

    train: data.Examples
    held: data.Examples | None
    test: data.Examples | None


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    if options.model and models.model_kind(options.model) == 'decoder':
        return language.run(options)
    _roads.settle(options, _roads.ENCODER, _roads.LANGUAGE)
    _accumulate.check(options)
    with _mesh.entered(options) as mesh:
        return _tune(options, mesh)


def _tune(options: argparse.Namespace, mesh: Mesh | None) -> int:
    recipe, *more = chosen(options.method)
    if more:
        raise ValueError(f'tune takes one method; got {options.method!r}. compare takes several')
    recipe = settled(options, recipe)
    place = _going.place(options)
    if place.is_finished(options):
        return 0
    board = _metrics.board() if options.tensorboard else None
    parts = _parts(options)
    task = load_task(options.model, parts.train.names, options.max_tokens, mesh)
    tokens = task.encode(parts.train.texts)
    settings = Settings(
        epochs=options.epochs,
        batch=options.batch,
        rate=options.rate,
        accumulate=options.accumulate,
    )
    steps = step_count(len(parts.train), settings)
    fitter = Fitter(task, recipe, settings, tokens.input_ids.shape[1], steps)
    say(str(fitter.peft))
    evaluation = _evaluation(fitter, task, parts.held, options.evaluations)
    examples = (tokens, parts.train.labels)
    batches, shown = fitter.batches(*examples, options.seed), 1 if recipe.probe else steps
    also = {'labels': list(task.names)}
    with _going.going(place, fitter, batches, shown, options, board, also) as run:
        fitted = fitter.fit(examples, run.state, batches, run.watch, evaluation, run.saving)
        if fitted.steps:
            run.draw(f'{recipe.name}, {options.train or "the shipped messages"}', 'example')
        _saved.save(place.out / _run_folder.ADAPTER, fitter, fitted, options.seed, overwrite=True)
    _going.finish(place)
    say(f'{fitted.steps} steps in {fitted.seconds:.1f} s; written to {place.out}')
    if parts.test is not None:
        accuracy = fitter.accuracy(fitted.phi, task.encode(parts.test.texts), parts.test.labels)
        say(f'accuracy on {len(parts.test)} test messages: {accuracy:.1f} %')
    return 0


def _parts(options: argparse.Namespace) -> Parts:
    """The examples that the options name; those held back are never trained on."""
    train, test = read(options)
    own, places = split(len(train), options)
    held = train.take(places) if len(places) else None
    if options.eval_data:
        held = labelled(options.eval_data, options, train.names)
    train = train.take(own)
    if options.shots:
        train = data.few_shot(train, options.shots, options.seed)
    return Parts(train, held, test)


def _evaluation(fitter: Fitter, task: Task, held: data.Examples | None, times: int) -> Evaluation:
    """Loss and accuracy on what was held back."""
    if held is None:
        return Evaluation(None, times)
    return Evaluation(partial(fitter.evaluate, task.encode(held.texts), held.labels), times)
