"""A factor: an array of phi, and how it lies along the dimensions of a weight.

It stays in memory as phi has it: a scan slices it as it lies, and at the use one transposition, or
none, brings it into the form that the use needs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax import lax

from peftjax._types import Array


class Factor(NamedTuple):
    """An array along the dimensions of a weight; of size one where it does not depend on them.

    Attributes:
      array: in any order.
      order: for each dimension of the weight the dimension of `array`, `None` where it has none;
        then the extra dimensions of `array`.
    """

    array: Array
    order: tuple[int | None, ...]

    @classmethod
    def formed(cls, array: Array) -> 'Factor':
        """A factor that is in broadcast form (see `_layout`)."""
        return cls(array, tuple(range(array.ndim)))

    def form(self) -> Array:
        """Its broadcast form."""
        return pick(self, range(len(self.order)), len(self.order))

    def astype(self, dtype: Any) -> 'Factor':
        """The same in another dtype."""
        return Factor(lax.convert_element_type(self.array, dtype), self.order)


def lay(array: Array, axes: Sequence[int | None], rank: int) -> Factor:
    """Says how an array lies along a leaf.

    Args:
      array: with one dimension for each of `axes`.
      axes: the leaf axis that each dimension goes along, each below `rank`; `None` for extra ones.
      rank: the number of dimensions of the leaf.
    """
    where = {axis: d for d, axis in enumerate(axes) if axis is not None}
    extra = (d for d, axis in enumerate(axes) if axis is None)
    return Factor(array, (*(where.get(axis) for axis in range(rank)), *extra))


def along(
    arrays: Mapping[str, Array], axes: Mapping[str, Sequence[int | None]], rank: int
) -> tuple[dict[str, Factor], dict[str, frozenset[int]]]:
    """Arrays of phi as factors, and the leaf axes that each depends on.

    Args:
      arrays: by name.
      axes: for each, the leaf axis that each dimension goes along; `None` where it goes along none.
      rank: the number of dimensions of the leaf.
    """
    factors = {name: lay(array, axes[name], rank) for name, array in arrays.items()}
    spans = {name: frozenset(a for a in axes[name] if a is not None) for name in arrays}
    return factors, spans


def place(array: Array, axes: Sequence[int], rank: int) -> Array:
    """Brings an array into broadcast form.

    Args:
      array: `(*axes, *extra)`: one dimension per named leaf axis, in that order, then extras.
      axes: the leaf axes, each below `rank`.
      rank: the number of dimensions of the leaf.

    Returns:
      `(*leaf dimensions, *extra)`, of size one along the other leaf axes.
    """
    return lay(array, (*axes, *(None,) * (array.ndim - len(axes))), rank).form()


def pick(f: Factor, dims: Sequence[int | None], rank: int) -> Array:
    """A factor reduced to some dimensions of the weight, in that order.

    Args:
      f: of size one along all other dimensions.
      dims: of the weight; `None` stands for the extra dimensions, which otherwise come last.
      rank: the number of dimensions of the weight.
    """
    extra = f.order[rank:]
    dims = (*dims,) if None in dims or not extra else (*dims, None)
    wanted = [p for d in dims for p in (extra if d is None else (f.order[d],))]
    kept = [p for p in range(f.array.ndim) if p in wanted]
    order = [kept.index(p) for p in wanted if p is not None]
    new = [i for i, p in enumerate(wanted) if p is None]
    # most factors lie as they are needed, and even an operation that does nothing takes its time
    array = f.array
    if len(kept) < array.ndim:
        array = lax.squeeze(array, [p for p in range(array.ndim) if p not in kept])
    if order != sorted(order):
        array = lax.transpose(array, order)
    return lax.expand_dims(array, new) if new else array
