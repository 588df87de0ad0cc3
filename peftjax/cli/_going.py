"""A run from its beginning, or from where it was cut off; both kinds of models go this way."""

import argparse
import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import peftjax as pj
from peftjax import _processes
from peftjax.cli import _config, _metrics, _output, _plot, _run_folder
from peftjax.cli._loop import Saving
from peftjax.cli._terminal import progress, say
from peftjax.cli._watch import Watch

FREE = {
    *_config.UNSAID, 'out', 'model', 'train', 'test', 'eval_data', 'eval_part', 'evaluations',
    'tensorboard', 'save_every', 'remat', 'mesh', 'processes',
}  # fmt: skip
"""Options that may be others when a run goes on: they do not say what is computed, or it is known
from elsewhere, as the weights are and the rows that are trained on."""


class Place(NamedTuple):
    """Where a run leaves what it finds.

    Attributes:
      out: the folder.
      begun: whether a run was begun there that is taken up.
    """

    out: pathlib.Path
    begun: bool

    def is_finished(self, options: argparse.Namespace) -> bool:
        """Whether nothing is left to do, which is said.

        Args:
          options: as parsed, all that is known filled in.

        Raises:
          ValueError: what has come to its end is another run.
        """
        if not _processes.told(self.begun and _run_folder.is_finished(self.out)):
            return False
        _processes.led('compare the options', lambda: _check_same(self.out, options))
        finish(self)
        say(f'{self.out} has come to its end: there is nothing to go on with')
        return True


def place(options: argparse.Namespace) -> Place:
    """The place that options name; nothing is made yet.

    Args:
      options: as parsed.

    Returns:
      The place.

    Raises:
      OSError: it is taken, or no folder can be made there.
    """
    out = pathlib.Path(options.out)
    begun = _processes.told(options.resume and _run_folder.is_begun(out))
    replace = options.overwrite or begun
    _processes.led('use the folder of the run', lambda: _check(out, replace))
    return Place(out, begun)


def _check(out: pathlib.Path, replace: bool) -> None:
    _output.check_free(out, replace)
    _run_folder.check(out)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options that say what is computed."""
    return {name: value for name, value in vars(options).items() if name not in FREE}


def _check_same(out: pathlib.Path, options: argparse.Namespace) -> None:
    """Refuses options that are not those of the run that came to its end, as far as it says."""
    if not (out / _config.FILE).exists():
        return
    now = _settings(options)
    before = {key.replace('-', '_'): v for key, v in _config.read(out / _config.FILE).items()}
    wrong = [
        f'{name} was {before.get(name)!r:.300} and is {value!r:.300} now'
        for name, value in now.items()
        if before.get(name) != (list(value) if isinstance(value, tuple) else value)
    ]
    if wrong:
        raise ValueError(
            f'{out} has come to its end as another run: {"; ".join(wrong)}. Leave --resume out '
            'and choose another --out, or --overwrite'
        )


def finish(place: Place) -> None:
    """Removes what the run would be taken up again from."""
    _processes.led('clear up the folder of the run', lambda: _run_folder.finish(place.out))


class Going(NamedTuple):
    """What a run needs on its way.

    Attributes:
      state: to begin with.
      watch: what measures and shows.
      saving: where states are kept.
      draw: writes the picture of the losses, given its title and what a loss is the mean of.
    """

    state: pj.TrainState
    watch: Watch
    saving: Saving
    draw: Callable[[str, str], None]


@contextlib.contextmanager
def going(
    place: Place,
    fitter: Any,
    batches: Any,
    steps: int,
    options: argparse.Namespace,
    board: Any,
    also: Mapping[str, Any],
) -> Iterator[Going]:
    """Begins a run or takes it up: its folder, its state, where its batches stand.

    Args:
      place: where.
      fitter: what fits: its `peft`, `task`, `rates` and `start`.
      batches: fresh ones, which are put where the run stopped.
      steps: to show.
      options: as parsed, defaults filled in.
      board: as from `_metrics.board`, or None.
      also: what must be the same, besides options, when the run goes on.

    Yields:
      What the run needs.

    Raises:
      BlockingIOError: another process writes to the folder.
      CheckpointError: what is to go on is damaged.
      ValueError: it is another run.
    """
    if not place.begun:
        _processes.led('clear the folder of the run', lambda: _run_folder.clear(place.out))
    settings = {**_settings(options), **also}
    folder = place.out / _run_folder.CHECKPOINTS
    with pj.Checkpoints(folder, fitter.peft, fitter.task.params, settings=settings) as checkpoints:
        if not place.begun:  # only now: whoever looks finds the earlier run, or this one
            _processes.led('forget an earlier run', lambda: _run_folder.forget(place.out))
        state = checkpoints.resume(fitter.start(options.seed), batches)
        write = partial(_config.write, place.out / _config.FILE, options)
        _processes.led('write the options', write)  # not those of a run that was refused
        after = int(state.step) or None
        if after is not None:
            say(f'goes on after step {after}')
        out = place.out if _processes.first() else None
        with _metrics.Metrics(out, board, after) as metrics, progress(steps) as bar:
            bar.set_description(options.method)
            watch = Watch(options.method, fitter.rates, bar, metrics)
            picture = partial(_plot.draw, place.out / _plot.FILE, metrics.rows)
            draw = lambda *how: _processes.led('draw the losses', lambda: picture(*how))
            yield Going(state, watch, Saving(checkpoints, options.save_every), draw)
