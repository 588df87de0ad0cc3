"""The stand-in: a pytree that stands where a weight stood."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp

from peftjax import _layout
from peftjax._factor import Factor
from peftjax._factor import place as place
from peftjax._types import Array, Path

if TYPE_CHECKING:
    from peftjax._method import Rule
    from peftjax._sites import Site

Axes: TypeAlias = frozenset[int]


def _first(w: Array) -> Array:
    return jax.lax.index_in_dim(w, 0, keepdims=False)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Hole:
    """The place of a weight that is no array: the stand-in over it makes it of its factors.

    Attributes:
      struct: the array that would be here.
      casts: the dtypes that it went through after its own.
    """

    struct: jax.ShapeDtypeStruct
    casts: tuple[Any, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as it stands now."""
        return self.struct.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the weight as it stands now."""
        return self.struct.dtype

    def move(self, on_weight: Callable[[Any], Any]) -> 'Hole':
        """After a layout operation or a cast."""
        struct = jax.eval_shape(on_weight, self.struct)
        cast = () if struct.dtype == self.dtype else (struct.dtype,)
        return Hole(struct, (*self.casts, *cast))

    def body(self) -> 'Hole':
        """Without the first dimension."""
        return Hole(jax.eval_shape(_first, self.struct), self.casts)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=['w', 'laid'],
    meta_fields=['dims', 'spans', 'rule', 'path', 'orders'],
)
@dataclasses.dataclass(frozen=True)
class StandIn:
    """A weight together with what a method adds to it, on its way to its use.

    As a pytree it is sliced by `lax.scan`, carried by `jax.checkpoint` and `lax.cond` like the
    weight alone. `rule` knows what happens at the use; the stand-in only knows the geometry.

    Attributes:
      w: the weight as it stands now, or the stand-in of the method below; `None` at a named value,
        a `Hole` where the rule makes the weight of the factors alone.
      laid: the factors as they lie in memory.
      dims: for each current dimension of the weight, the leaf axes that it is made of.
      spans: for each factor, the leaf axes that it depends on.
      rule: what the method does at the use.
      path: where the leaf lies.
      orders: for each factor, how it lies along the current dimensions (see `Factor`).
    """

    w: Any
    laid: dict[str, Array]
    dims: _layout.Labels
    spans: tuple[tuple[str, Axes], ...]
    rule: 'Rule'
    path: Path
    orders: tuple[tuple[str, tuple[int | None, ...]], ...] = ()

    @classmethod
    def over(
        cls,
        site: 'Site',
        w: Any,
        factors: Mapping[str, Array | Factor],
        spans: Mapping[str, Axes],
        rule: 'Rule',
    ) -> 'StandIn':
        """A stand-in at the leaf of a site, before anything moved it.

        Args:
          site: where.
          w: the leaf, or the stand-in of the method below.
          factors: laid along the leaf, or arrays in broadcast form.
          spans: for each factor, the leaf axes that it depends on.
          rule: what the method does at the use.
        """
        dims = tuple(frozenset({d}) for d in range(site.rank))
        laid = {
            name: f if isinstance(f, Factor) else Factor.formed(f) for name, f in factors.items()
        }
        orders = tuple((name, f.order) for name, f in laid.items())
        arrays = {name: f.array for name, f in laid.items()}
        return cls(w, arrays, dims, tuple(spans.items()), rule, site.path, orders)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as it stands now."""
        return self.w.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the weight as it stands now."""
        return self.w.dtype

    @property
    def factors(self) -> dict[str, Array]:
        """The factors in broadcast form (see `_layout`), extra dimensions last."""
        return {name: self.factor(name).form() for name in self.laid}

    def factor(self, name: str) -> Factor:
        """A factor as it lies."""
        return Factor(self.laid[name], dict(self.orders)[name])

    def _with(self, laid: Mapping[str, Factor], **changes: Any) -> 'StandIn':
        arrays = {name: f.array for name, f in laid.items()}
        orders = tuple((name, f.order) for name, f in laid.items())
        return dataclasses.replace(self, laid=arrays, orders=orders, **changes)

    def full(self, name: str) -> _layout.Full:
        """For each dimension, whether a factor has its full size there."""
        axes = dict(self.spans)[name]
        return tuple(bool(label & axes) for label in self.dims)

    def move(self, layout: _layout.Layout, on_weight: Callable[[Any], Any]) -> 'StandIn | None':
        """Applies a layout operation; `None` if a factor has no broadcast form after it."""
        tried = {name: layout.move(self.factor(name), self.full(name)) for name in self.laid}
        moved = {name: f for name, f in tried.items() if f is not None}
        if len(moved) < len(tried):
            return None
        now = self._with(moved, w=_moved(self.w, layout, on_weight), dims=layout.dims)
        return now if self.rule.holds(now) else None

    def lead(self) -> 'StandIn | Array':
        """The same, with factors that `lax.scan` can slice along the first dimension.

        The dense weight, if it cannot be sliced there.
        """
        if not self.rule.holds(self.body()):
            return self.dense()
        length, wide = self.shape[0], {name: self.factor(name) for name in self.laid}
        for name, f in wide.items():
            if f.order[0] != 0 or f.array.shape[0] != length:
                array = f.form()
                array = jnp.broadcast_to(array, (length, *array.shape[1:]))
                wide[name] = Factor.formed(array)
        below = self.w.lead() if isinstance(self.w, StandIn) else self.w
        return self._with(wide, w=below)

    def body(self) -> 'StandIn':
        """What `lax.scan` hands to its body: the first dimension is gone."""
        below = self.w.body() if isinstance(self.w, StandIn | Hole) else self.w
        orders = tuple(
            (name, tuple(d if d is None else d - 1 for d in order[1:]))
            for name, order in self.orders
        )
        return dataclasses.replace(self, w=below, dims=self.dims[1:], orders=orders)

    @property
    def hollow(self) -> bool:
        """Whether the weight at the bottom is no array."""
        return self.w.hollow if isinstance(self.w, StandIn) else isinstance(self.w, Hole)

    def solid(self) -> 'StandIn | Array':
        """The same over arrays: what is made of factors alone is made now."""
        if isinstance(self.w, Hole):
            return self.dense()
        below = self.w.solid() if isinstance(self.w, StandIn) else self.w
        return dataclasses.replace(self, w=below)

    def dense(self) -> Array:
        """The adapted weight as an array."""
        below = self.w.dense() if isinstance(self.w, StandIn) else self.w
        return self.rule.dense(self, below)

    def outer(self, left: str, right: str, dtype: Any) -> Array:
        """The product of two factors over their one extra dimension, in the weight's shape."""
        rank, factors = len(self.dims), self.factors
        terms = []
        for name in (left, right):
            full = self.full(name)
            kept = tuple(d for d in range(rank) if full[d])
            squeezed = jnp.squeeze(factors[name], tuple(set(range(rank)) - set(kept)))
            terms += [squeezed.astype(dtype), (*kept, rank)]
        both = sorted(set(terms[1] + terms[3]) - {rank})
        product = jnp.einsum(*terms, both)
        missing = tuple(d for d in range(rank) if d not in both)
        return jnp.broadcast_to(jnp.expand_dims(product, missing), self.shape)


def _moved(w: Any, layout: _layout.Layout, on_weight: Callable[[Any], Any]) -> Any:
    """What lies below a stand-in after a layout operation; dense, if it cannot travel on."""
    if isinstance(w, Hole):
        return w.move(on_weight)
    if not isinstance(w, StandIn):
        return on_weight(w)
    moved = w.move(layout, on_weight)
    return on_weight(w.dense()) if moved is None else moved


def bare(path: Path, w: Any, rule: Any) -> StandIn:
    """A stand-in without factors."""
    return StandIn(w, {}, tuple(frozenset({d}) for d in range(len(w.shape))), (), rule, path)
