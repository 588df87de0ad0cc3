"""Adapter folders of decoders, and the decoders under them."""

import os
import pathlib

import jax
import jax.numpy as jnp

from peftjax import checkpoint, models
from peftjax.cli import _saved
from peftjax.cli._run_folder import find

TASKS = {_saved.LANGUAGE: 'CAUSAL_LM', _saved.TASK: 'SEQ_CLS'}
"""What the adapters of the commands are for, and what PEFT calls it."""

IDS = jax.ShapeDtypeStruct((1, 8), jnp.int32)
"""Token ids that a decoder is traced with."""


def open_adapter(folder: str) -> checkpoint.Loaded:
    """Reads an adapter folder that a command wrote.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it holds no adapter, or one that is for something else.
    """
    path = find(pathlib.Path(folder).expanduser())
    if path.is_dir() and not (path / checkpoint.ADAPTER).exists():
        raise ValueError(f'{folder} must be an adapter, which has an {checkpoint.ADAPTER}. '
                         f'{kind(path)}')  # fmt: skip
    loaded = checkpoint.load(path)
    if loaded.metadata.get('task') not in TASKS:
        raise ValueError(
            f'{folder} must have been made by peftjax tune, compare or import; it is an adapter '
            f'for something else: {loaded.metadata!r:.200}'
        )
    return loaded


def load_base(model: str, dtype: jax.typing.DTypeLike | None = None) -> models.LoadedDecoder:
    """Loads the decoder under an adapter, by default in the dtype of its checkpoint.

    Raises:
      OSError: it is not there.
      ValueError: it is no decoder that can be read.
    """
    stored = jnp.dtype(models.decoder_config(model).dtype)
    return models.load_decoder(model, dtype=stored if dtype is None else dtype)


def check_absent(path: str, overwrite: bool | None = None) -> None:
    """Refuses a place where there is something.

    Args:
      path: of a folder to make.
      overwrite: whether it may be replaced; None where the command cannot do so.

    Raises:
      FileExistsError: there is something.
    """
    if os.path.lexists(path) and not overwrite:
        also = '' if overwrite is None else ', or --overwrite'
        raise FileExistsError(f'there is something at {path} already. Choose another --out{also}')


def kind(path: pathlib.Path) -> str:
    """What a folder is that is no adapter, as a sentence."""
    if (path / 'adapter_config.json').exists():
        return 'This one is of PEFT: peftjax import makes an adapter of it'
    if (path / 'config.json').exists():
        return 'This one is a model'
    if (path / 'options.toml').exists():
        return 'This one is of a run that did not come to its end'
    return 'This one is something else'
