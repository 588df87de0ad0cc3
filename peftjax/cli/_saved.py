"""The adapter folders that `tune` and `compare` leave and `predict` reads."""

import dataclasses
import os
import pathlib
from typing import Any

from peftjax import checkpoint
from peftjax.cli._fit import Fitted, Fitter

TASK = 'classification'


def save(
    folder: str | os.PathLike[str], fitter: Fitter, fitted: Fitted, seed: int, overwrite: bool
) -> int:
    """Writes an adapter folder, whole or not at all.

    Args:
      folder: to make.
      fitter: what made the fit.
      fitted: the fit.
      seed: it was made with.
      overwrite: whether to replace an adapter that is there.

    Returns:
      The bytes of its files.
    """
    task, recipe = fitter.task, fitter.recipe
    metadata = {
        'task': TASK,
        'model': _lasting(task.model),
        'labels': list(task.names),
        'max_tokens': task.max_tokens,
        'method': recipe.name,
        'seed': seed,
        'settings': dataclasses.asdict(fitter.settings),
    }
    path = checkpoint.save(
        folder,
        fitted.peft,
        fitted.phi,
        params=task.params,
        metadata=metadata,
        overwrite=overwrite,
    )
    return sum(file.stat().st_size for file in path.rglob('*') if file.is_file())


def load(folder: str | os.PathLike[str]) -> tuple[checkpoint.Loaded, dict[str, Any]]:
    """Reads an adapter folder.

    Returns:
      The adapter, and `model`, `labels` and `max_tokens` of its task.

    Raises:
      ValueError: the adapter was made by something else.
    """
    loaded = checkpoint.load(folder)
    if loaded.metadata.get('task') != TASK:
        raise ValueError(
            f'{folder} must have been made by peftjax tune or compare; it is an adapter for '
            f'something else: {loaded.metadata!r:.200}'
        )
    return loaded, loaded.metadata


def _lasting(model: str) -> str:
    """A model's folder so that it is found from elsewhere; hub names stay as they are."""
    path = pathlib.Path(model).expanduser()
    return str(path.resolve()) if model and path.is_dir() else model
