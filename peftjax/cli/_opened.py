"""Adapter folders as people name them: read, or said what they are instead."""

import difflib
import os
import pathlib

from peftjax import checkpoint
from peftjax.cli import _config
from peftjax.cli._run_folder import find


def opened(folder: str | os.PathLike[str]) -> checkpoint.Loaded:
    """Reads an adapter folder, or the one in the folder of a run.

    Args:
      folder: the one or the other.

    Returns:
      The adapter.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it holds no adapter, or a damaged one.
    """
    path = find(pathlib.Path(folder).expanduser())
    if path.is_dir() and not is_adapter(path):
        raise ValueError(
            f'{folder} must be an adapter, which has an {checkpoint.ADAPTER}. {kind(path)}'
        )
    try:
        return checkpoint.load(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f'no such adapter folder: {folder}.{alike(path)} Name one that tune, compare or import '
            'left'
        ) from error


def is_adapter(path: pathlib.Path) -> bool:
    """Whether a folder is an adapter, or that of a run with one."""
    return (find(path) / checkpoint.ADAPTER).exists()


def kind(path: pathlib.Path) -> str:
    """What a folder is that is no adapter, as a sentence."""
    if (path / 'adapter_config.json').exists():
        return 'This one is of PEFT: peftjax import makes an adapter of it'
    if (path / 'config.json').exists():
        return 'This one is a model'
    if inside := [str(one) for one in (*path.glob('*'), *path.glob('adapters/*'))
                  if is_adapter(one)]:  # fmt: skip
        return f'Adapters in it: {", ".join(sorted(inside)[:5])}'
    if (path / _config.FILE).exists():
        return 'This one is of a run that did not come to its end'
    return 'This one is something else'


def alike(path: pathlib.Path) -> str:
    """A question after an adapter that nearly has that name; empty where there is none."""
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    names = {one.name: one for one in beside if one.name[:1] != '.' and is_adapter(one)}
    close = difflib.get_close_matches(path.name, names, n=1)
    return f' Did you mean {str(names[close[0]])!r}?' if close else ''


def check_model(model: str | None) -> None:
    """Refuses an adapter where its model is to be named.

    Args:
      model: folder or hub name; None or empty for none.

    Raises:
      ValueError: it is an adapter.
    """
    if not model:
        return
    folder = pathlib.Path(model).expanduser()
    if is_adapter(folder) and not (folder / 'config.json').exists():
        base = opened(folder).metadata.get('model') or 'the default model'
        raise ValueError(
            f'a model is wanted, which has a config.json; {model} is an adapter of {base}. Name '
            'that model'
        )
