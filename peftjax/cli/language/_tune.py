"""`peftjax tune` on a language model: one method, one folder with adapter and metrics."""

import argparse

from jax.sharding import Mesh

from peftjax import models
from peftjax.cli import _accumulate, _going, _mesh, _metrics, _report, _roads
from peftjax.cli._terminal import say
from peftjax.cli.language import _data, _recipes, _saved, _task
from peftjax.cli.language._fit import Fitted, Fitter, Settings


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    _roads.settle(options, _roads.LANGUAGE, _roads.ENCODER)
    _accumulate.check(options)
    with _mesh.entered(options) as mesh:
        return _tune(options, mesh)


def _tune(options: argparse.Namespace, mesh: Mesh | None) -> int:
    recipe = _recipes.chosen(options.method)
    method = _recipes.settle(options, models.decoder_config(options.model))
    options.pack = _packs(options, method)
    options.rate = recipe.rate if options.rate is None else options.rate
    place = _going.place(options)
    if place.is_finished(options):
        return 0
    board = _metrics.board() if options.tensorboard else None
    records = _data.read(options)
    task = _task.load(
        options.model, options.dtype, options.quantize, options.embeddings, options.remat, mesh
    )
    split = _data.rows(task, records, options, options.pack)
    settings = _settings(options, split)
    fitter = Fitter(task, task.attach(method), settings)
    say(f'{fitter.peft}\n{_about(split, settings)}')
    batches, times = fitter.batches(split.train, options.seed), options.evaluations
    with _going.going(place, fitter, batches, settings.steps, options, board, {}) as run:
        fitted = fitter.fit(split, run.state, batches, times, run.watch, run.saving)
        run.draw(f'{recipe.name}, {options.train}', 'token')
        _saved.save(place.out, task, fitter.peft, fitted, recipe, settings, options.seed)
    _going.finish(place)
    say(_end(fitted, settings))
    say(f'written to {place.out}')
    return 0


def _packs(options: argparse.Namespace, method: object) -> bool:
    """Whether a row holds several examples: where the method can, unless told otherwise.

    Raises:
      ValueError: it is asked of a method that cannot.
    """
    virtual = getattr(method, 'virtual', None) is not None
    if virtual and options.pack:
        raise ValueError(
            f'--pack is not for {options.method}: the virtual tokens stand in front of a row, and '
            'only its first example would see them. Leave it out'
        )
    return not virtual if options.pack is None else options.pack


def _settings(options: argparse.Namespace, split: _data.Split) -> Settings:
    return Settings(
        rate=options.rate,
        steps=options.steps or options.epochs * -(-len(split.train) // options.batch),
        batch=options.batch,
        accumulate=options.accumulate,
        length=options.length,
        pack=options.pack,
        answer_only=options.answer_only,
        warmup=options.warmup,
        decay=options.decay,
        weight_decay=options.weight_decay,
        dtype=options.dtype,
        quantize=options.quantize,
        embeddings=options.embeddings,
    )


def _about(split: _data.Split, settings: Settings) -> str:
    """What will be done, in a line or two."""
    parts = [f'{len(split.train.samples):,} examples in {len(split.train):,} rows']
    if split.held is not None:
        parts.append(f'{len(split.held.samples):,} to evaluate on')
    if split.dropped:
        parts.append(f'{split.dropped:,} left out, over {settings.length} tokens')
    return f'{", ".join(parts)}; {settings.steps:,} steps of {settings.batch}'


def _end(fitted: Fitted, settings: Settings) -> str:
    speed = fitted.tokens / fitted.seconds
    return (
        f'{settings.steps:,} steps in {fitted.seconds:.1f} s, {speed:,.0f} tokens/s, '
        f'{_report.size(fitted.peak_bytes)} at most'
    )
