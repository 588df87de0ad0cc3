"""`peftjax tune` on a language model: one method, one folder with adapter and metrics."""

import argparse
import pathlib

import peftjax as pj
from peftjax import models
from peftjax.cli import _accumulate, _config, _metrics, _output, _plot, _report, _roads, _run_folder
from peftjax.cli._loop import Saving
from peftjax.cli._terminal import progress, say
from peftjax.cli._watch import Watch
from peftjax.cli.language import _data, _recipes, _saved, _task
from peftjax.cli.language._fit import Fitted, Fitter, Settings


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    _roads.settle(options, _roads.LANGUAGE, _roads.ENCODER)
    _accumulate.check(options)
    recipe = _recipes.chosen(options.method)
    goes_on = options.resume and _run_folder.is_begun(pathlib.Path(options.out))
    out = _output.check_free(options.out, options.overwrite or goes_on)
    if goes_on and _run_folder.is_finished(out):
        _run_folder.finish(out)
        say(f'{out} has come to its end: there is nothing to go on with')
        return 0
    board = _metrics.board() if options.tensorboard else None
    method = _recipes.settle(options, models.decoder_config(options.model))
    options.pack = _packs(options, method)
    records = _data.read(options)
    task = _task.load(
        options.model, options.dtype, options.quantize, options.embeddings, options.remat
    )
    split = _data.rows(task, records, options, options.pack)
    options.rate = recipe.rate if options.rate is None else options.rate
    settings = _settings(options, split)
    fitter = Fitter(task, task.attach(method), settings)
    say(f'{fitter.peft}\n{_about(split, settings)}')
    if not goes_on:
        _run_folder.clear(out)
    with _checkpoints(out, fitter, options) as checkpoints:
        _config.write(out / _config.FILE, options)
        batches = fitter.batches(split.train, options.seed)
        state = checkpoints.resume(fitter.start(options.seed), batches)
        after = int(state.step) or None
        if after is not None:
            say(f'goes on after step {after}')
        with _metrics.Metrics(out, board, after) as metrics, progress(settings.steps) as bar:
            bar.set_description(recipe.name)
            watch = Watch(recipe.name, fitter.rates, bar, metrics)
            saving = Saving(checkpoints, options.save_every)
            fitted = fitter.fit(split, state, batches, options.evaluations, watch, saving)
    _plot.draw(out / _plot.FILE, metrics.rows, f'{recipe.name}, {options.train}', 'token')
    _saved.save(out, task, fitter.peft, fitted, recipe, settings, options.seed)
    _run_folder.finish(out)
    say(_end(fitted, settings))
    say(f'written to {out}')
    return 0


FREE = {
    *_config.UNSAID, 'out', 'model', 'train', 'eval_data', 'eval_part', 'evaluations',
    'tensorboard', 'save_every', 'remat',
}  # fmt: skip
"""Options that may be others when a run goes on: they do not say what is computed, or it is known
from elsewhere, as the weights are and the rows that are trained on."""


def _checkpoints(out: pathlib.Path, fitter: Fitter, options: argparse.Namespace) -> pj.Checkpoints:
    settings = {name: value for name, value in vars(options).items() if name not in FREE}
    folder = out / _run_folder.CHECKPOINTS
    return pj.Checkpoints(folder, fitter.peft, fitter.task.params, settings=settings)


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
