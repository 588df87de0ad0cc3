"""From a decoder's parameters back to a Hugging Face folder, one file at a time."""

import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import _folder
from peftjax.models._compute import Compute
from peftjax.models._decoder import Decoder
from peftjax.models._decoder_config import DecoderConfig
from peftjax.models._families import read_decoder_config
from peftjax.models._fill import by_path
from peftjax.models._load_decoder import decoder_naming, decoder_shapes
from peftjax.models._names import source
from peftjax.models._tokenizer import copy_tokenizer


class _Slice(NamedTuple):
    """A tensor of the checkpoint: a slice of a parameter, as it is stored."""

    name: str
    path: str
    at: tuple[int, ...]
    transposed: bool
    size: int


def save_decoder(
    folder: str | os.PathLike[str],
    config: DecoderConfig,
    params: Mapping[str, Any],
    *,
    shard_bytes: int = 5 * 10**9,
    tokenizer_of: str | os.PathLike[str] | None = None,
) -> pathlib.Path:
    """Writes a Hugging Face folder that transformers, vLLM or `load_decoder` read.

    The folder holds config.json, as it was read, and the weights in their dtype. It is whole or
    absent. No more is held in memory than the model and one file.

    Args:
      folder: to make.
      config: of the decoder, as it was read from a `config.json`.
      params: nested dicts of arrays under `'params'`, layers scanned or unrolled.
      shard_bytes: most bytes in one file; a larger model becomes several with an index.
      tokenizer_of: a model's folder, from which the files of its tokenizer are carried along.

    Returns:
      The folder.

    Raises:
      FileExistsError: there is something already.
      FileNotFoundError: there is no folder at `tokenizer_of`.
      ValueError: parameters that are not the config's, by name, or a config made or changed by
        hand: its fields are not written back.
      OSError: the folder cannot be written.

    Example:
      >>> save_decoder('merged', llama.config, peft.merge(llama.params, phi))  # doctest: +SKIP
    """
    target = pathlib.Path(folder)
    if os.path.lexists(target):
        raise FileExistsError(f'there is something at {target} already. Choose another folder.')
    if tokenizer_of is not None and not pathlib.Path(tokenizer_of).is_dir():
        raise FileNotFoundError(
            f'no such folder to take a tokenizer from: {tokenizer_of}. Name the folder of a model, '
            'or leave tokenizer_of out.'
        )
    _check_config(config)
    leaves = by_path(params)
    _check(leaves, config)
    shards = _shards(_slices(leaves, config), shard_bytes)
    total = sum(tensor.size for shard in shards for tensor in shard)
    with _folder.whole(target, ours=frozenset(), overwrite=False, size=total) as fresh:
        _write_config(fresh, config, leaves)
        _write_weights(fresh, shards, leaves, total)
        if tokenizer_of is not None:
            copy_tokenizer(tokenizer_of, fresh)
    return target


def _check_config(config: DecoderConfig) -> None:
    """Refuses a config that is not what its `config.json` says."""
    law = 'a decoder is saved with the config.json that its config was read from; this config was'
    if not config.source:
        raise ValueError(f'{law} made by hand. Make it with read_decoder_config.')
    written = read_decoder_config(json.loads(config.source))
    names = [field.name for field in dataclasses.fields(config)]
    changed = [name for name in names if getattr(config, name) != getattr(written, name)]
    if changed:
        raise ValueError(
            f'{law} changed after, in {changed}. Change the fields of config.source instead, and '
            'read them with read_decoder_config.'
        )


def _check(leaves: Mapping[str, jax.Array], config: DecoderConfig) -> None:
    compute = Compute(scan_layers=config.is_scanned(leaves))
    shapes = decoder_shapes(Decoder(config, compute))
    absent, beyond = sorted(set(shapes) - set(leaves)), sorted(set(leaves) - set(shapes))
    if absent or beyond:
        raise ValueError(
            f'params must be those of the config: {len(absent)} are missing {absent[:5]}, '
            f'{len(beyond)} are not known {beyond[:5]}.'
        )
    for path, leaf in leaves.items():
        if leaf.shape != shapes[path].shape:
            raise ValueError(f'{path} must have shape {shapes[path].shape}, got {leaf.shape}.')


def _slices(leaves: Mapping[str, jax.Array], config: DecoderConfig) -> Iterator[_Slice]:
    naming = decoder_naming(config)
    for path, leaf in leaves.items():
        origin = source(path, naming)
        inside = path.startswith(f'{naming.prefix}/')
        places = itertools.product(*map(range, origin.stack))
        for name, at in zip(origin.names, places, strict=True):
            stored = f'{naming.prefix}.{name}' if inside else name
            yield _Slice(stored, path, at, origin.transposed, leaf.nbytes // len(origin.names))


def _shards(slices: Iterator[_Slice], most: int) -> list[list[_Slice]]:
    """Tensors by file; a file holds one at least."""
    shards: list[list[_Slice]] = []
    room = 0
    for tensor in slices:
        if not shards or tensor.size > room:
            shards.append([])
            room = most
        shards[-1].append(tensor)
        room -= tensor.size
    return shards


def _write_config(
    folder: pathlib.Path, config: DecoderConfig, leaves: Mapping[str, jax.Array]
) -> None:
    fields = json.loads(config.source)
    names = config.names
    dtype = jnp.dtype(leaves[f'{names.body}/{names.embedding}/embedding'].dtype).name
    known = [key for key in ('dtype', 'torch_dtype') if key in fields] or ['torch_dtype']
    fields |= dict.fromkeys(known, dtype)
    text = json.dumps(fields, indent=2, sort_keys=True)
    (folder / 'config.json').write_text(text + '\n', encoding='utf-8')


def _write_weights(
    folder: pathlib.Path,
    shards: list[list[_Slice]],
    leaves: Mapping[str, jax.Array],
    total: int,
) -> None:
    from safetensors.numpy import save_file

    count = len(shards)
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, 1):
        file = f'model-{index:05}-of-{count:05}.safetensors' if count > 1 else 'model.safetensors'
        tensors = {tensor.name: _tensor(leaves[tensor.path], tensor) for tensor in shard}
        save_file(tensors, folder / file, metadata={'format': 'pt'})
        weight_map |= dict.fromkeys(tensors, file)
    if count > 1:
        index_file = {'metadata': {'total_size': total}, 'weight_map': weight_map}
        text = json.dumps(index_file, indent=2, sort_keys=True)
        (folder / 'model.safetensors.index.json').write_text(text + '\n', encoding='utf-8')


def _tensor(leaf: jax.Array, tensor: _Slice) -> np.ndarray:
    value = np.asarray(leaf[tensor.at] if tensor.at else leaf)
    return np.ascontiguousarray(value.T if tensor.transposed else value)
