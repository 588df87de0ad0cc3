"""The stand-in: a pytree that stands where a weight stood."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp

from peftjax import _layout
from peftjax._types import Array, Path

if TYPE_CHECKING:
    from peftjax._method import Rule
    from peftjax._sites import Site

Axes: TypeAlias = frozenset[int]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=['w', 'factors'],
    meta_fields=['dims', 'spans', 'rule', 'path'],
)
@dataclasses.dataclass(frozen=True)
class StandIn:
    """A weight together with what a method adds to it, on its way to its use.

    As a pytree it is sliced by `lax.scan`, carried by `jax.checkpoint` and `lax.cond` like the
    weight alone. `rule` knows what happens at the use; the stand-in only knows the geometry.

    Attributes:
      w: the weight as it stands now, or the stand-in of the method below; `None` at a named value.
      factors: arrays in broadcast form (see `_layout`), extra dimensions last.
      dims: for each current dimension of the weight, the leaf axes that it is made of.
      spans: for each factor, the leaf axes that it depends on.
      rule: what the method does at the use.
      path: where the leaf lies.
    """

    w: Any
    factors: dict[str, Array]
    dims: _layout.Labels
    spans: tuple[tuple[str, Axes], ...]
    rule: 'Rule'
    path: Path

    @classmethod
    def over(
        cls,
        site: 'Site',
        w: Any,
        factors: dict[str, Array],
        spans: dict[str, Axes],
        rule: 'Rule',
    ) -> 'StandIn':
        """A stand-in at the leaf of a site, before anything moved it."""
        dims = tuple(frozenset({d}) for d in range(site.rank))
        return cls(w, factors, dims, tuple(spans.items()), rule, site.path)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as it stands now."""
        return self.w.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the weight as it stands now."""
        return self.w.dtype

    def full(self, name: str) -> _layout.Full:
        """For each dimension, whether a factor has its full size there."""
        axes = dict(self.spans)[name]
        return tuple(bool(label & axes) for label in self.dims)

    def move(self, layout: _layout.Layout, on_weight: Callable[[Any], Any]) -> 'StandIn | None':
        """Applies a layout operation; `None` if a factor has no broadcast form after it."""
        moved = {name: layout.move(f, self.full(name)) for name, f in self.factors.items()}
        if any(f is None for f in moved.values()):
            return None
        below = self.w.move(layout, on_weight) if isinstance(self.w, StandIn) else on_weight(self.w)
        if below is None:
            return None
        return dataclasses.replace(self, w=below, factors=moved, dims=layout.dims)

    def lead(self) -> 'StandIn':
        """The same, with factors that `lax.scan` can slice along the first dimension."""
        length = self.shape[0]
        wide = {
            name: jnp.broadcast_to(f, (length, *f.shape[1:])) if f.shape[0] != length else f
            for name, f in self.factors.items()
        }
        below = self.w.lead() if isinstance(self.w, StandIn) else self.w
        return dataclasses.replace(self, w=below, factors=wide)

    def body(self) -> 'StandIn':
        """What `lax.scan` hands to its body: the first dimension is gone."""
        below = self.w.body() if isinstance(self.w, StandIn) else self.w
        return dataclasses.replace(self, w=below, dims=self.dims[1:])

    def dense(self) -> Array:
        """The adapted weight as an array."""
        below = self.w.dense() if isinstance(self.w, StandIn) else self.w
        return self.rule.dense(self, below)

    def outer(self, left: str, right: str, dtype: Any) -> Array:
        """The product of two factors over their one extra dimension, in the weight's shape."""
        rank = len(self.dims)
        terms = []
        for name in (left, right):
            full = self.full(name)
            kept = tuple(d for d in range(rank) if full[d])
            squeezed = jnp.squeeze(self.factors[name], tuple(set(range(rank)) - set(kept)))
            terms += [squeezed.astype(dtype), (*kept, rank)]
        both = sorted(set(terms[1] + terms[3]) - {rank})
        product = jnp.einsum(*terms, both)
        missing = tuple(d for d in range(rank) if d not in both)
        return jnp.broadcast_to(jnp.expand_dims(product, missing), self.shape)


def place(array: Array, axes: tuple[int, ...], rank: int) -> Array:
    """Brings a factor into broadcast form.

    Args:
      array: `(*axes, *extra)`: one dimension per named leaf axis, in that order, then extras.
      axes: the leaf axes, each below `rank`.
      rank: the number of dimensions of the leaf.

    Returns:
      `(*leaf dimensions, *extra)`, of size one along the other leaf axes.
    """
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    array = jnp.transpose(array, (*order, *range(len(axes), array.ndim)))
    sizes = dict(zip(sorted(axes), array.shape, strict=False))
    shape = [sizes.get(d, 1) for d in range(rank)]
    return jnp.reshape(array, (*shape, *array.shape[len(axes) :]))
