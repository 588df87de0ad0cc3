"""Adapter folders of decoders, and the decoders under them."""

import os
import pathlib

import jax
import jax.numpy as jnp

from peftjax import Peft, checkpoint, models
from peftjax.cli import _output, _saved
from peftjax.cli._opened import opened

TASKS = {_saved.LANGUAGE: 'CAUSAL_LM', _saved.TASK: 'FEATURE_EXTRACTION'}
"""What the adapters of the commands are for, and what PEFT calls it: an encoder, since none of its
classifiers reads what ours reads."""

IDS = jax.ShapeDtypeStruct((1, 8), jnp.int32)
"""Token ids that a decoder is traced with."""


def open_adapter(folder: str) -> checkpoint.Loaded:
    """Reads an adapter folder that a command wrote.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it holds no adapter, or one that is for something else.
    """
    loaded = opened(folder)
    if loaded.metadata.get('task') not in TASKS:
        raise ValueError(
            f'{folder} must have been made by peftjax tune, compare or import; it is an adapter '
            f'for something else: {loaded.metadata!r:.200}'
        )
    return loaded


def load_base(model: str, scan_layers: bool) -> models.LoadedDecoder:
    """Loads the decoder under an adapter, in the dtype that its weights are stored in.

    Raises:
      OSError: it is not there.
      ValueError: it is no decoder that can be read.
    """
    return models.load_decoder(model, dtype=stored_dtype(model), scan_layers=scan_layers)


def scans(peft: Peft, model: str) -> bool:
    """Whether an adapter is over the layers of a decoder as one stack, or over each by itself.

    Raises:
      OSError: the decoder is not there.
      ValueError: it is no decoder that can be read.
    """
    return models.decoder_config(model).is_scanned(path for path, _, _ in peft.leaves)


def stored_dtype(model: str) -> jnp.dtype:
    """The dtype that the weights of a decoder lie in, whatever its config.json says of them.

    Raises:
      OSError: it is not there.
      ValueError: it is no decoder that can be read.
    """
    return jnp.dtype(models.abstract_decoder(model).model.compute.dtype)


def check_absent(path: str, overwrite: bool | None = None) -> None:
    """Refuses a place where there is something, or where nothing can be made.

    Args:
      path: of a folder to make.
      overwrite: whether it may be replaced; None where the command cannot do so.

    Raises:
      FileExistsError: there is something.
      NotADirectoryError: a file stands in the way.
    """
    _output.check_way(pathlib.Path(path))
    if os.path.lexists(path) and not overwrite:
        also = '' if overwrite is None else ', or --overwrite'
        raise FileExistsError(f'there is something at {path} already. Choose another --out{also}')
