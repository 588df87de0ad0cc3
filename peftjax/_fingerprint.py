"""A fingerprint of the base parameters: enough to know them again, small enough to store."""

import base64
import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import _paths, _processes
from peftjax._quantized import Quantized
from peftjax._types import Array, Path, PyTree

COUNT = 16
GOLDEN = 0x9E3779B97F4A7C15


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """A few values of every leaf of the base parameters.

    It tells another checkpoint of the same shapes from this one. It does not see a change that
    misses all sampled values, such as a few edited rows of one embedding.

    Attributes:
      leaves: path, shape, dtype and the sampled values (their bytes in base64) of each leaf.
    """

    leaves: tuple[tuple[Path, tuple[int, ...], str, str], ...]

    @property
    def digest(self) -> str:
        """Sixteen characters that another base does not have: for people to compare."""
        text = json.dumps(self.leaves)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @classmethod
    def of(cls, params: PyTree) -> 'Fingerprint':
        """Reads at most 16 values of each leaf; no leaf is copied as a whole.

        Args:
          params: pytree of arrays, on any device, sharded or not; of a quantized leaf the values
            that its codes stand for. Where parts of it lie with other processes, all of them ask.

        Raises:
          TypeError: a leaf holds no values.
          ValueError: parts of a leaf lie with no process that runs.
        """
        found = []
        for path, leaf in _paths.leaves(params).items():
            if not _has_values(leaf):
                raise TypeError(
                    f'a fingerprint needs the values of params; {path!r} is {leaf!r:.80}. '
                    'Pass the arrays, or no params'
                )
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(jnp.asarray(leaf))
            values = base64.b64encode(_sample(path, leaf).tobytes()).decode()
            found.append((path, tuple(leaf.shape), str(leaf.dtype), values))
        return cls(tuple(found))

    def differing(self, params: PyTree) -> list[Path]:
        """The paths of leaves with other values, among those that both sides have.

        A leaf of another float dtype counts as the same where rounding explains the difference.
        """
        return self.apart(Fingerprint.of(params))

    def apart(self, other: 'Fingerprint') -> list[Path]:
        """As `differing`, from another fingerprint."""
        mine = {path: (shape, dtype, text) for path, shape, dtype, text in self.leaves}
        wrong = []
        for path, shape, dtype, text in other.leaves:
            if path in mine and not _same(mine[path], (shape, dtype, text)):
                wrong.append(path)
        return wrong


def _has_values(leaf: Any) -> bool:
    parts = leaf.parts.values() if isinstance(leaf, Quantized) else (leaf,)
    return all(isinstance(part, jax.Array | np.ndarray | np.generic) for part in parts)


def _sample(path: Path, leaf: Any) -> np.ndarray:
    """Values at places that depend on the path and the size alone."""
    where = _places(path, leaf)
    if isinstance(leaf, Quantized):
        return np.asarray(leaf.at(where, lambda part, there: _values(path, part, there)))
    return _values(path, leaf, where)


def _places(path: Path, leaf: Any) -> np.ndarray:
    """Some indices: `(axes, count)`."""
    size = math.prod(leaf.shape)
    start = zlib.crc32(path.encode()) << 32
    # The multiples of the golden ratio spread evenly, whatever the strides of the leaf.
    spread = {((start + i * GOLDEN) % 2**64 * size) >> 64 for i in range(COUNT)}
    spread = spread if size > COUNT else set(range(size))
    places = np.asarray(sorted(spread), np.int64)
    where = np.empty((len(leaf.shape), len(places)), np.int64)
    for axis in reversed(range(len(leaf.shape))):
        places, where[axis] = np.divmod(places, max(leaf.shape[axis], 1))
    return where


def _values(path: Path, leaf: Any, where: np.ndarray) -> np.ndarray:
    """The values of an array at some indices."""
    count = where.shape[1]
    values, left = np.zeros(count, leaf.dtype), np.ones(count, bool)
    for corner, piece in _pieces(leaf):
        local = where - np.reshape(np.asarray(corner, np.int64), (-1, 1))
        inside = left & np.all((0 <= local) & (local < np.reshape(piece.shape, (-1, 1))), axis=0)
        if inside.any():
            values[inside] = _gather(piece, tuple(local[:, inside].astype(np.int32)))
            left &= ~inside
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        values, left = _processes.united(values, left)
    if left.any():
        raise ValueError(
            f'a fingerprint needs the values of params; parts of {path!r} lie with no process that '
            'runs. Gather it first, or pass no params'
        )
    return values


def _pieces(leaf: Any) -> Iterator[tuple[tuple[int, ...], Any]]:
    """The parts of a leaf that lie on single devices, each with its first index."""
    if not isinstance(leaf, jax.Array):
        yield (0,) * len(leaf.shape), leaf
        return
    for shard in leaf.addressable_shards:
        yield tuple(part.start or 0 for part in shard.index), shard.data


def _gather(piece: Any, where: tuple[np.ndarray, ...]) -> np.ndarray:
    if not isinstance(piece, jax.Array):
        return piece[where]
    # Under the caller's mesh, JAX refuses to compute on one of its devices alone.
    alone = jax.sharding.Mesh(np.asarray(list(piece.devices())), ('one',))
    with jax.set_mesh(alone):
        return np.asarray(_take(piece, where))


@jax.jit
def _take(piece: Array, where: tuple[Array, ...]) -> Array:
    return piece[where]


def _same(one: tuple[tuple[int, ...], str, str], two: tuple[tuple[int, ...], str, str]) -> bool:
    if one == two:
        return True
    kinds = [np.dtype(dtype) for _, dtype, _ in (one, two)]
    floats = all(jnp.issubdtype(kind, np.floating) for kind in kinds)
    if one[0] != two[0] or kinds[0] == kinds[1] or not floats:
        return False
    limits = [jnp.finfo(kind) for kind in kinds]
    left, right = (
        np.frombuffer(base64.b64decode(text), kind).astype(np.float64)
        for (_, _, text), kind in zip((one, two), kinds, strict=True)
    )
    relative = max(float(limit.eps) for limit in limits)
    absolute = max(float(limit.smallest_subnormal) for limit in limits)
    return bool(np.allclose(left, right, rtol=relative, atol=absolute, equal_nan=True))
