"""The folder that `tune` fills: an adapter, what was measured, a picture, the options."""

import pathlib
import shutil

from peftjax import checkpoint, resume
from peftjax.cli import _config, _metrics, _plot

ADAPTER = 'adapter'
"""Where the adapter lies in it."""

CHECKPOINTS = 'checkpoints'
"""Where states lie while a run goes on."""


def clear(out: pathlib.Path) -> None:
    """Makes the folder, without the results of an earlier run; what else is there stays.

    Raises:
      FileExistsError: the folder is an adapter itself.
    """
    if (out / checkpoint.ADAPTER).exists():
        raise FileExistsError(f'--out must be the folder of a run; {out} is an adapter. '
                              'Choose another --out')  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    for name in (_metrics.FILE, _plot.FILE, _config.FILE):
        (out / name).unlink(missing_ok=True)
    for file in (out / _metrics.BOARD).glob('events.*'):
        file.unlink()
    adapter = out / ADAPTER
    if (adapter / 'manifest.json').is_file():
        shutil.rmtree(adapter)
    finish(out)


def finish(out: pathlib.Path) -> None:
    """Removes what a run is taken up again from."""
    checkpoints = out / CHECKPOINTS
    if (checkpoints / resume.FILE).is_file():
        shutil.rmtree(checkpoints)


def is_begun(out: pathlib.Path) -> bool:
    """Whether a run was begun in this folder that can go on, or has come to its end."""
    return (out / CHECKPOINTS / resume.FILE).is_file() or is_finished(out)


def is_finished(out: pathlib.Path) -> bool:
    """Whether a run in this folder has come to its end."""
    return (out / ADAPTER / checkpoint.ADAPTER).is_file()


def find(folder: pathlib.Path) -> pathlib.Path:
    """The adapter's folder: this one, or the one in the folder of a run."""
    inner = folder / ADAPTER
    return inner if (inner / checkpoint.ADAPTER).is_file() else folder
