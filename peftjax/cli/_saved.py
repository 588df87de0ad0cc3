"""The adapter folders that `tune` and `compare` leave, and that `predict` and `generate` read."""

import dataclasses
import os
import pathlib
from typing import Any

from peftjax import checkpoint
from peftjax.cli._fit import Fitted, Fitter
from peftjax.cli._opened import opened

TASK = 'classification'
LANGUAGE = 'language-model'
READERS = {TASK: 'an encoder: peftjax predict', LANGUAGE: 'a language model: peftjax generate'}
MOVED = 'Where the model has moved, say so with --model'


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
        'model': lasting(task.model),
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


def load(folder: str | os.PathLike[str], task: str) -> tuple[checkpoint.Loaded, dict[str, Any]]:
    """Reads an adapter folder, or the one in the folder of a run.

    Args:
      folder: the one or the other.
      task: that the adapter must be for.

    Returns:
      The adapter, and what is known of its task: `model`, `max_tokens` and more.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it holds no adapter, or one that was made for something else.
    """
    loaded = opened(folder)
    found = loaded.metadata.get('task')
    if found != task:
        known = f'one of {READERS[found]} takes it' if found in READERS else (
            f'one for something else: {loaded.metadata!r:.200}')  # fmt: skip
        raise ValueError(
            f'{folder} must hold an adapter of {READERS[task].split(":")[0]}; it holds {known}'
        )
    return loaded, loaded.metadata


def lasting(model: str) -> str:
    """A model's folder so that it is found from elsewhere; hub names stay as they are."""
    path = pathlib.Path(model).expanduser()
    return str(path.resolve()) if model and path.is_dir() else model
