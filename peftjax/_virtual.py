"""Virtual tokens: room made in the arguments, and cut from the results.

The token argument is padded with dummy ids, and what goes with it (masks, positions) is padded
too. The model sizes everything else itself. What lies at the places of the dummies is overwritten
by the method, and the places are cut from the results, along the dimensions that grew.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import _paths
from peftjax._types import Array, PyTree

FILL = {
    'attention_mask': 1,
    'mask': 1,
    'padding_mask': 1,
    'pool_mask': 0,
    'segment_ids': 1,
    'token_type_ids': 0,
    'labels': -100,
    'targets': -100,
}
POSITIONS = ('position_ids', 'positions', 'position')


@dataclasses.dataclass(frozen=True)
class Virtual:
    """Virtual tokens that a method needs room for.

    Attributes:
      length: how many.
      side: `front` or `back` of the sequence.
      tokens: regex for the path of the argument with token ids: a position (`'0'`), a keyword, a
        path into one (`'0/input_ids'`).
      dummy: the id that holds their places.
      fill: what other arguments get at their places, by name, over the usual ones of `FILL`; `None`
        leaves an argument as it is.
      shift: whether real tokens count those in front of them in their positions.
    """

    length: int
    side: str
    tokens: str
    dummy: int
    fill: tuple[tuple[str, int | float | None], ...]
    shift: bool

    def pad(self, array: Array, axis: int, value: Any) -> Array:
        """An array with room along one dimension."""
        widths = [(0, 0)] * array.ndim
        widths[axis] = (self.length, 0) if self.side == 'front' else (0, self.length)
        return jnp.pad(array, widths, constant_values=np.asarray(value).astype(array.dtype))

    def cut(self, array: Array, axis: int) -> Array:
        """The same without the room."""
        size = array.shape[axis]
        start = self.length if self.side == 'front' else 0
        return jax.lax.slice_in_dim(array, start, start + size - self.length, axis=axis)

    def extend(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """The arguments with room for the virtual tokens.

        Raises:
          ValueError: there is no such token argument, or another argument of its shape has no
            known value for virtual tokens.
        """
        named = {**{str(i): arg for i, arg in enumerate(args)}, **kwargs}
        leaves = _paths.leaves(named)
        path, ids = self._ids(leaves)
        new = {path: self.pad(ids, ids.ndim - 1, self.dummy)}
        for other, leaf in leaves.items():
            if other != path and _goes_with(leaf, ids):
                new[other] = self._padded(other, leaf, ids)
        out = _paths.replace(named, new)
        return [out[str(i)] for i in range(len(args))], {name: out[name] for name in kwargs}

    def _ids(self, leaves: Mapping[str, Any]) -> tuple[str, Array]:
        """The argument with token ids, and its path."""
        found = [path for path in leaves if re.fullmatch(self.tokens, path)]
        if len(found) == 1:
            ids = leaves[found[0]]
            if np.issubdtype(getattr(ids, 'dtype', np.bool_), np.integer) and ids.ndim:
                return found[0], ids
        shapes = {path: getattr(leaf, 'shape', leaf) for path, leaf in leaves.items()}
        raise ValueError(
            f'tokens={self.tokens!r} must match one integer argument of token ids; it matches '
            f'{found} among the arguments {shapes}. Set tokens to one of these names'
        )

    def _padded(self, path: str, leaf: Array, ids: Array) -> Array:
        last = path.rpartition('/')[2]
        own = dict(self.fill)
        said = next((name for name in (path, last) if name in own), None)
        if said is not None:
            value = own[said]
            return leaf if value is None else self.pad(leaf, leaf.ndim - 1, value)
        if leaf.ndim < ids.ndim and leaf.shape[0] == ids.shape[0]:
            raise ValueError(
                f'{path!r} of shape {leaf.shape} may go with the tokens or with the examples: the '
                f'ids have shape {ids.shape}. Say it: fill=(({path!r}, value),) for tokens, value '
                'None for examples'
            )
        if last in FILL:
            return self.pad(leaf, leaf.ndim - 1, FILL[last])
        if last in POSITIONS:
            return self._positions(leaf)
        if np.issubdtype(leaf.dtype, np.bool_):
            return self.pad(leaf, leaf.ndim - 1, True)
        raise ValueError(
            f'virtual tokens need a value in every argument that goes with the tokens; {path!r} of '
            f'shape {leaf.shape} has none. Say it: fill=(({path!r}, value),), with None for an '
            'argument that has nothing to do with tokens'
        )

    def _positions(self, leaf: Array) -> Array:
        if self.side == 'back' or not self.shift:
            return self.pad(leaf, leaf.ndim - 1, 0)
        front = jnp.broadcast_to(
            jnp.arange(self.length, dtype=leaf.dtype), (*leaf.shape[:-1], self.length)
        )
        return jnp.concatenate([front, leaf + self.length], axis=-1)


def _goes_with(leaf: Any, ids: Array) -> bool:
    """Whether an argument has one number for each token, or one row for all."""
    shape = getattr(leaf, 'shape', None)
    if not shape or shape[-1] != ids.shape[-1] or len(shape) > ids.ndim:
        return False
    rows = ids.shape[ids.ndim - len(shape) : -1]
    return all(a in (1, b) for a, b in zip(shape[:-1], rows, strict=True))


def grown(before: Sequence[int], after: Sequence[int], by: int) -> tuple[int, ...]:
    """The dimensions of a shape that grew by a number."""
    if len(before) != len(after):
        return ()
    return tuple(d for d, (a, b) in enumerate(zip(before, after, strict=True)) if b - a == by)


def shorten(virtual: Virtual, shapes: PyTree, outs: PyTree) -> PyTree:
    """Cuts results back to the shapes that they have without virtual tokens.

    Raises:
      ValueError: a result changed its shape in another way.
    """

    def one(keys: Any, shape: Any, out: Array) -> Array:
        for axis in grown(shape.shape, out.shape, virtual.length):
            out = virtual.cut(out, axis)
        if out.shape != shape.shape:
            raise ValueError(
                f'virtual tokens may only lengthen results, each axis by their number or not at '
                f'all: the result{jax.tree_util.keystr(keys)} of shape {shape.shape} became '
                f'{out.shape} with {virtual.length} of them. Let tokens have an axis of their own '
                'there: reshape, or join with other axes, after the forward'
            )
        return out

    return jax.tree_util.tree_map_with_path(one, shapes, outs)
