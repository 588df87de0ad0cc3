"""The folder that `tune` fills: an adapter, what was measured, a picture, the options."""

import pathlib
import shutil

from peftjax import _folder, checkpoint, resume
from peftjax.cli import _config, _metrics, _plot

ADAPTER = 'adapter'
"""Where the adapter lies in it."""

CHECKPOINTS = 'checkpoints'
"""Where states lie while a run goes on."""


def check(out: pathlib.Path) -> None:
    """Refuses a folder whose adapter could not be replaced when the run comes to its end.

    Raises:
      FileExistsError: the folder is an adapter itself, or what lies at its adapter's place is none.
    """
    if (out / checkpoint.ADAPTER).exists():
        raise FileExistsError(f'--out must be the folder of a run; {out} is an adapter. '
                              'Choose another --out')  # fmt: skip
    _folder.check_free(out / ADAPTER, checkpoint.OURS, overwrite=True)


def clear(out: pathlib.Path) -> None:
    """Makes the folder, without the states of an earlier run, whose results stay for now.

    Raises:
      BlockingIOError: another process writes to it.
    """
    if _has_states(out):
        resume.check_free(out / CHECKPOINTS)
    out.mkdir(parents=True, exist_ok=True)
    finish(out)


def forget(out: pathlib.Path) -> None:
    """Removes what an earlier run measured, once the new one has its states here.

    The earlier adapter stays until the new one is whole and takes its place.
    """
    for name in (_metrics.FILE, _plot.FILE, _config.FILE):
        (out / name).unlink(missing_ok=True)
    for file in (out / _metrics.BOARD).glob('events.*'):
        file.unlink()


def finish(out: pathlib.Path) -> None:
    """Removes what a run is taken up again from."""
    if _has_states(out):
        _remove(out / CHECKPOINTS)
    shutil.rmtree(_aside(out / CHECKPOINTS), ignore_errors=True)  # a removal was cut off


def _remove(folder: pathlib.Path) -> None:
    """Gone at once for all who look: a part of it must not be taken for the whole."""
    aside = _aside(folder)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def _aside(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(f'.{folder.name}.gone')


def _has_states(out: pathlib.Path) -> bool:
    """Whether a run keeps its states here, if only since a moment: the lock comes first."""
    return any((out / CHECKPOINTS / name).is_file() for name in (resume.LOCK, resume.FILE))


def is_begun(out: pathlib.Path) -> bool:
    """Whether a run was begun in this folder that can go on, or has come to its end."""
    return _has_states(out) or is_finished(out)


def is_finished(out: pathlib.Path) -> bool:
    """Whether a run in this folder has come to its end.

    An adapter beside states may be an earlier run's: the run that has the states goes on.
    """
    return (out / ADAPTER / checkpoint.ADAPTER).is_file() and not _has_states(out)


def find(folder: pathlib.Path) -> pathlib.Path:
    """The adapter's folder: this one, or the one in the folder of a run."""
    inner = folder / ADAPTER
    return inner if (inner / checkpoint.ADAPTER).is_file() else folder
