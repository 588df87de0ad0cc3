"""The folder that `compare` fills: kept from what is there already."""

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
      FileExistsError: there is a file, or a folder with content that is not to be replaced.
    """
    out = pathlib.Path(path)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f'--out must be a folder; {out} is a file')
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(
            f'{out} exists and is not empty. Choose another --out, or --overwrite'
        )
    return out


def clear(out: pathlib.Path) -> None:
    """Makes the folder, without the results of an earlier run; what else is there stays."""
    (out / ADAPTERS).mkdir(parents=True, exist_ok=True)
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)
    for folder in (out / ADAPTERS).iterdir():
        if re.search(r'-seed\d+$', folder.name) and (folder / 'manifest.json').is_file():
            shutil.rmtree(folder)
