"""The folder that `tune` fills: an adapter, what was measured, a picture, the options."""

import pathlib
import shutil

from peftjax import checkpoint
from peftjax.cli import _config, _metrics, _plot

ADAPTER = 'adapter'
"""Where the adapter lies in it."""


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


def find(folder: pathlib.Path) -> pathlib.Path:
    """The adapter's folder: this one, or the one in the folder of a run."""
    inner = folder / ADAPTER
    return inner if (inner / checkpoint.ADAPTER).is_file() else folder
