"""A decoder with quantized weights as a folder; neither writing nor reading holds them dense.

config.json                  Hugging Face's, as it was
quantized.json               the file, shape, dtype and scheme of each parameter, layers stacked
quantized-00001.safetensors  codes, scales and steps by path; other parameters as they are
manifest.json                the sha256 of every file
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import _manifest, _processes, _safetensors
from peftjax._manifest import CheckpointError
from peftjax._quantized import Quantized, Scheme
from peftjax._shapes import differences
from peftjax._version import __version__
from peftjax.models._fill import ShardingOf, insert

ABOUT = 'quantized.json'
Tensors = dict[str, np.ndarray]


def write(folder: pathlib.Path, leaves: Iterable[tuple[str, Any]], shard_bytes: int) -> None:
    """Writes parameters, quantized or not, as they come.

    Args:
      folder: to write to.
      leaves: paths and parameters, layers stacked.
      shard_bytes: a file is closed when it holds as many.
    """
    from safetensors.numpy import save_file

    about: dict[str, Any] = {}
    for number, shard in enumerate(_shards(leaves, shard_bytes), 1):
        file = f'quantized-{number:05}.safetensors'
        save_file({n: t for path, leaf in shard.items() for n, t in _tensors(path, leaf).items()},
                  folder / file)  # fmt: skip
        about |= {path: _entry(leaf) | {'file': file} for path, leaf in shard.items()}
    head = {'format': _manifest.FORMAT, 'writer': f'peftjax {__version__}', 'leaves': about}
    (folder / ABOUT).write_text(json.dumps(head, indent=1) + '\n', encoding='utf-8')


def seal(folder: pathlib.Path) -> None:
    """Writes the manifest of all that a folder holds."""
    _manifest.seal(folder, f'peftjax {__version__}')


def read(
    folder: pathlib.Path, shapes: Mapping[str, jax.ShapeDtypeStruct], sharding: ShardingOf | None
) -> dict[str, Any]:
    """The parameters of a sealed folder, one after the other.

    Args:
      folder: that `write` filled.
      shapes: of the model's parameters, layers stacked or not, with the dtypes that they get.
      sharding: from a path to where the parameter lives; None is the default device.

    Returns:
      Nested dicts of arrays and quantized leaves.

    Raises:
      CheckpointError: a file is damaged or missing, or of another model or version.
    """
    _manifest.verify(folder, others=True)
    about = _manifest.parse(folder / ABOUT)['leaves']
    stored: Tensors = {}
    for file in dict.fromkeys(entry['file'] for entry in about.values()):
        stored |= _safetensors.read(folder / file)
    homes = {path: _home(path, about) for path in shapes}
    _check(folder, shapes, homes, about)
    params: dict[str, Any] = {}
    for path, (home, at) in homes.items():
        leaf = _leaf(stored, home, at, about[home]['scheme'], shapes[path])
        insert(params, path, put(leaf, sharding(path) if sharding else None, may_alias=False))
    return params


def as_stored(
    folder: pathlib.Path, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Parameters in the dtypes that they had before some were quantized, as the table tells them.

    Args:
      folder: with the table.
      shapes: of the model's parameters, layers stacked.

    Returns:
      The shapes.

    Raises:
      CheckpointError: the table is damaged, or of another model or version.
    """
    about = _table(folder, shapes)
    return {
        path: jax.ShapeDtypeStruct(shape.shape, jnp.dtype(about[path]['dtype']))
        for path, shape in shapes.items()
    }


def abstract(folder: pathlib.Path, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """The shapes of the parameters of a folder that `write` filled, as its table tells them.

    Args:
      folder: with the table.
      shapes: of the model's parameters, layers stacked.

    Returns:
      Shapes by path; of a quantized parameter those of its codes and scales.

    Raises:
      CheckpointError: the table is damaged, or of another model or version.
    """
    about = _table(folder, shapes)
    schemes = {path: about[path]['scheme'] for path in shapes}
    return {
        path: shape if schemes[path] is None else Scheme(**schemes[path]).quantize(shape, path)
        for path, shape in shapes.items()
    }


def _table(folder: pathlib.Path, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """What the folder says of each parameter of a model with stacked layers."""
    about = _manifest.parse(folder / ABOUT)['leaves']
    _check(folder, shapes, {path: (path, None) for path in shapes}, about)
    return about


def _shards(leaves: Iterable[tuple[str, Any]], most: int) -> Iterator[dict[str, Any]]:
    """Leaves by file; a file holds one at least."""
    shard: dict[str, Any] = {}
    for path, leaf in leaves:
        shard[path] = leaf
        if sum(leaf.nbytes for leaf in shard.values()) >= most:
            yield shard
            shard = {}
    if shard:
        yield shard


def _tensors(path: str, leaf: Any) -> Tensors:
    parts = leaf.parts if isinstance(leaf, Quantized) else {'': leaf}
    named = {f'{path}.{name}' if name else path: part for name, part in parts.items()}
    return {name: np.ascontiguousarray(part) for name, part in named.items()}


def _entry(leaf: Any) -> dict[str, Any]:
    scheme = dataclasses.asdict(leaf.scheme) if isinstance(leaf, Quantized) else None
    return {'shape': list(leaf.shape), 'dtype': jnp.dtype(leaf.dtype).name, 'scheme': scheme}


def _home(path: str, about: Mapping[str, Any]) -> tuple[str, int | None]:
    """Where a parameter is stored: its path, and for one layer of a stack which."""
    number = re.search(r'/(\d+)/', path)
    if path in about or number is None:
        return path, None
    return path[: number.start()] + path[number.end() - 1 :], int(number[1])


def _check(
    folder: pathlib.Path,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    homes: Mapping[str, tuple[str, int | None]],
    about: Mapping[str, Any],
) -> None:
    """Refuses parameters of another model."""
    want = {}
    for path, (home, at) in homes.items():
        count = () if at is None else (sum(h == home for h, _ in homes.values()),)
        want[home] = (*count, *shapes[path].shape)
    have = {path: tuple(entry['shape']) for path, entry in about.items()}
    if wrong := differences(want, have, 'shape '):
        raise CheckpointError(
            f'{str(folder)!r} must hold the {len(want)} parameters of its config.json: '
            f'{wrong}. Quantize the model again'
        )


def _leaf(
    stored: Tensors, home: str, at: int | None, scheme: Any, shape: jax.ShapeDtypeStruct
) -> Any:
    cut = (lambda x: x) if at is None else (lambda x: x[at])
    if scheme is None:
        return cut(stored[home]).astype(shape.dtype, copy=False)
    found = {name: stored.get(f'{home}.{name}') for name in ('codes', 'scales', 'steps')}
    held: dict[str, Any] = {n: None if part is None else cut(part) for n, part in found.items()}
    width, dtype = shape.shape[-1], jnp.dtype(shape.dtype)
    return Quantized(**held, scheme=Scheme(**scheme), width=width, dtype=dtype)


def put(leaf: Any, where: jax.sharding.Sharding | None, *, may_alias: bool = True) -> Any:
    """Brings a leaf to its devices.

    Args:
      leaf: quantized or not, in host memory.
      where: it is to live; None is the default device.
      may_alias: whether a CPU may take the memory over; it must not where that is a file's.

    Returns:
      The leaf there.
    """
    if isinstance(leaf, Quantized) and isinstance(where, jax.sharding.NamedSharding):
        places = leaf.shardings(where)
    else:
        places = jax.tree.map(lambda _: where, leaf)
    if where is not None and not where.is_fully_addressable:
        return jax.tree.map(_processes.put, leaf, places)
    return jax.device_put(leaf, places, may_alias=may_alias)
