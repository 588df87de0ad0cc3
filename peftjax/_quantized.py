"""A quantized leaf: one weight of theta as codes and scales, and how it is made.

Blocks lie along the last axis, so that the axes before it (stacked layers, experts, rows of a
table) can be sliced, looked up and sharded as those of the weight.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from peftjax import _codes
from peftjax._types import Array, Path, PyTree


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=['codes', 'scales', 'steps'],
    meta_fields=['scheme', 'width', 'dtype'],
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """One weight as codes of few bits, with a scale for each block of its last axis.

    A pytree node of plain arrays, and one leaf of theta with the shape and dtype of the weight for
    all that peftjax does.

    Attributes:
      codes: `(*lead, width)` int8, or `(*lead, ceil(width / 2))` uint8, two codes in a byte.
      scales: `(*lead, blocks)`: float32, or uint8 where they are quantized themselves.
      steps: `(*lead, ceil(blocks / 256))` float32, what a step of the scales is worth; else `None`.
      scheme: how the weight was quantized.
      width: length of the last axis.
      dtype: of the weight.
    """

    codes: Array
    scales: Array
    steps: Array | None
    scheme: 'Scheme'
    width: int
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return (*self.codes.shape[:-1], self.width)

    @property
    def ndim(self) -> int:
        """The number of axes of the weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return sum(math.prod(part.shape) * part.dtype.itemsize for part in self.parts.values())

    @property
    def parts(self) -> dict[str, Array]:
        """The arrays by name."""
        named = {'codes': self.codes, 'scales': self.scales, 'steps': self.steps}
        return {name: array for name, array in named.items() if array is not None}

    def made_of(self, parts: Mapping[str, Any]) -> 'Quantized':
        """Another part of a weight, or one moved, quantized in the same way."""
        return dataclasses.replace(self, **{'steps': None, **parts})

    def dequantize(self) -> Array:
        """The weight as an array of its own shape and dtype (rounded, as it was quantized)."""
        return _decoded(self.codes, self.scales, self.steps, self.scheme, self.width, self.dtype)

    def at(self, where: Any, take: Callable[[Array, Any], Any]) -> Array:
        """Some of the weights, of which only the codes and scales are read.

        Args:
          where: their indices, `(axes, count)`, NumPy.
          take: finds the values of an array at such indices.
        """
        *lead, last = where
        packed = 2 if _codes.bits(self.scheme.code) == 4 else 1
        each = {'codes': packed, 'scales': self.scheme.block}
        each['steps'] = self.scheme.block * _codes.GROUP
        found = {
            name: jnp.asarray(take(part, np.stack([*lead, last // each[name]])))[:, None]
            for name, part in self.parts.items()
        }
        if packed == 2:  # the code that is wanted comes to the upper half
            found['codes'] = found['codes'] << jnp.asarray(4 * (last % 2), jnp.uint8)[:, None]
        return dataclasses.replace(self.made_of(found), width=1).dequantize()[:, 0]

    def shardings(self, sharding: NamedSharding) -> 'Quantized':
        """Where codes and scales lie, for a weight that lies as `sharding` says.

        The last axis is sharded where the blocks can be dealt out evenly.

        Args:
          sharding: of the weight.

        Returns:
          The same node with a sharding in place of each array, as `jax.device_put` takes it.
        """
        spec = (*sharding.spec, *(None,) * (self.ndim - len(sharding.spec)))
        axes = spec[-1] if isinstance(spec[-1], tuple) else (spec[-1],) * (spec[-1] is not None)
        count = math.prod(sharding.mesh.shape[axis] for axis in axes)

        def place(part: Any) -> NamedSharding:
            even = self.width % (count * self.scheme.block) == 0 and part.shape[-1] % count == 0
            last = spec[-1] if even else None
            return NamedSharding(sharding.mesh, PartitionSpec(*spec[:-1], last))

        return self.made_of({name: place(part) for name, part in self.parts.items()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """How weights are quantized: block-wise, by their largest magnitude.

    Attributes:
      code: `nf4` (16 levels as of normal numbers), `int4` (15 equal steps) or `int8` (255).
      block: how many neighbors along the last axis share a scale.
      double: quantize the scales too: 8 bits each, and a float32 for each 256 of them.

    Raises:
      ValueError: a field is out of range.

    Example:
      >>> import jax.numpy as jnp, peftjax as pj
      >>> w = jnp.sin(jnp.arange(128.0).reshape(1, 128))
      >>> leaf = pj.NF4.quantize(w)
      >>> leaf.shape, leaf.codes.shape, leaf.nbytes
      ((1, 128), (1, 64), 70)
      >>> bool(jnp.abs(leaf.dequantize() - w).max() < 0.16)
      True

    Reference: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3.
    """

    code: str = 'nf4'
    block: int = 64
    double: bool = True

    def __post_init__(self) -> None:
        if self.code not in _codes.STEPS:
            raise ValueError(f"Scheme: code must be 'nf4', 'int4' or 'int8'; got {self.code!r}")
        whole = isinstance(self.block, int) and not isinstance(self.block, bool)
        if not whole or self.block < 2 or self.block % 2:
            raise ValueError(f'Scheme: block must be even and positive; got {self.block!r}')

    def quantize(self, w: Any, path: str = '') -> Quantized:
        """Quantizes one weight.

        Args:
          w: `(*lead, width)` of a floating dtype; an array, or a `jax.ShapeDtypeStruct`, of which
            shapes are made. Codes and scales of an array with a `NamedSharding` lie as it does.
          path: what errors call it.

        Returns:
          Codes and scales, as one node.

        Raises:
          ValueError: the weight is a single number, or holds none.
          TypeError: its dtype is not a floating one.
        """
        if isinstance(w, Quantized):
            raise TypeError(f'{path!r} is quantized already ({w.scheme}). Dequantize it first')
        if not jnp.issubdtype(w.dtype, jnp.floating):
            raise TypeError(f'only floating weights are quantized; {path!r} is {w.dtype}')
        if not math.prod(w.shape) or not w.shape:
            raise ValueError(f'a weight needs axes and numbers; {path!r} has shape {w.shape}')
        if isinstance(w, jax.ShapeDtypeStruct):
            return self._shapes(w)
        return self._compiled(w)(self, w)

    def _shapes(self, w: Any) -> Quantized:
        return jax.eval_shape(functools.partial(_encoded, self), w)

    def _compiled(self, w: Any) -> Callable[..., Quantized]:
        """The rounding as one program, which keeps a sharded weight where it is."""
        where = None if isinstance(w, Tracer) else getattr(w, 'sharding', None)
        if not isinstance(where, NamedSharding):
            return _encoded_at_once
        return jax.jit(_encoded, static_argnums=0, out_shardings=self._shapes(w).shardings(where))


def _encoded(scheme: Scheme, w: Array) -> Quantized:
    x = w.astype(jnp.float32)
    scales = full = _codes.absmax(x, scheme.block)
    steps = None
    if scheme.double:
        scales, steps = _codes.doubled(full)
        full = _scales(scales, steps)
    full = _codes.repeated(full, scheme.block, w.shape[-1])
    codes = _codes.encode(x / jnp.where(full > 0, full, 1), scheme.code)
    if _codes.bits(scheme.code) == 4:
        codes = _codes.pack(codes)
    return Quantized(codes, scales, steps, scheme, w.shape[-1], jnp.dtype(w.dtype))


_encoded_at_once = jax.jit(_encoded, static_argnums=0)


def _scales(scales: Array, steps: Array | None) -> Array:
    """The scales in float32."""
    if steps is None:
        return scales
    return scales.astype(jnp.float32) * _codes.repeated(steps, _codes.GROUP, scales.shape[-1])


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _decoded(
    codes: Array, scales: Array, steps: Array | None, scheme: Scheme, width: int, dtype: Any
) -> Array:
    if _codes.bits(scheme.code) == 4:
        codes = _codes.unpack(codes, width)
    unit = _scales(scales, steps) / _codes.STEPS[scheme.code]
    wide = _codes.decode(codes, scheme.code) * _codes.repeated(unit, scheme.block, width)
    return wide.astype(dtype)


def is_quantized(leaf: Any) -> bool:
    """Whether a node is a quantized leaf: for `is_leaf` of `jax.tree` functions."""
    return isinstance(leaf, Quantized)


def whole(leaf: Any) -> Any:
    """A leaf as an array, quantized or not."""
    return leaf.dequantize() if isinstance(leaf, Quantized) else leaf


class Arrays(Mapping[Path, Array]):
    """Leaves as arrays: a quantized one is dequantized when a method looks at it."""

    def __init__(self, leaves: Mapping[Path, Any]):
        self._leaves = leaves

    def __getitem__(self, path: Path) -> Array:
        return whole(self._leaves[path])

    def __iter__(self) -> Iterator[Path]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)


def dequantize(params: PyTree) -> PyTree:
    """Ordinary parameters of quantized ones.

    Args:
      params: pytree with quantized leaves, or one such leaf; also abstract, under `jax.eval_shape`.

    Returns:
      The same tree with arrays of the original shapes and dtypes, as the forward sees them.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params = {'up': {'kernel': jnp.ones((3, 4)), 'bias': jnp.zeros(4)}}
      >>> quantized = pj.quantize(params, pj.INT8, target='kernel')
      >>> jax.tree.map(jnp.shape, pj.dequantize(quantized))
      {'up': {'bias': (4,), 'kernel': (3, 4)}}
    """
    return jax.tree.map(whole, params, is_leaf=is_quantized)
