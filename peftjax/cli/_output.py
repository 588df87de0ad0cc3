"""The folder that `compare` fills: kept from what is there already."""

import os
import pathlib
import re
import shutil

from peftjax.cli import _config

RESULTS = ('results.json', 'accuracy.png', 'table.txt', _config.FILE)
ADAPTERS = 'adapters'


def check_free(path: str | pathlib.Path, overwrite: bool) -> pathlib.Path:
    """A place for results; nothing is made yet.

    Args:
      path: of the folder.
      overwrite: whether a folder with content will do.

    Returns:
      The folder.

    Raises:
      FileExistsError: there is a file, a model, or a folder with content that is not to be
        replaced.
      OSError: no folder can be made there.
    """
    out = pathlib.Path(path)
    check_way(out)
    if (out / 'config.json').is_file():
        raise FileExistsError(f'{out} is the folder of a model. Choose another --out')
    if out.exists() and not out.is_dir():
        raise FileExistsError(f'--out must be a folder; {out} is a file')
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(
            f'{out} exists and is not empty. Choose another --out, or --overwrite'
        )
    return out


def check_way(out: pathlib.Path) -> None:
    """Refuses a place that no folder can be made at, before any work is done.

    Args:
      out: that is to be made.

    Raises:
      NotADirectoryError: a file stands in the way.
      PermissionError: nothing may be written there.
    """
    above = next(place for place in out.absolute().parents if place.exists())
    if not above.is_dir():
        raise NotADirectoryError(f'{out} cannot be made: {above} is a file. Choose another --out')
    if not os.access(above, os.W_OK):
        raise PermissionError(f'{out} cannot be made: {above} may not be written to. Choose '
                              'another --out')  # fmt: skip


def clear(out: pathlib.Path) -> None:
    """Makes the folder, without the results of an earlier run; what else is there stays."""
    (out / ADAPTERS).mkdir(parents=True, exist_ok=True)
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)
    for folder in (out / ADAPTERS).iterdir():
        if re.search(r'-seed\d+$', folder.name) and (folder / 'manifest.json').is_file():
            shutil.rmtree(folder)
