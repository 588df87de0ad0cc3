"""`gather`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from peftjax._factor import Factor, pick
from peftjax._types import Array
from peftjax._uses._base import Use
from peftjax._uses._shapes import align, placement, product, spread


@dataclasses.dataclass(frozen=True)
class Gather(Use):
    """A lookup: `x` holds the indices, and whole slices along the free dimensions are found.

    Attributes:
      numbers: of the equation.
      mode: what happens to indices out of bounds.
      fill: what is found there; `None` for what JAX puts there.
      offset: the dimensions of `y` that the free dimensions make, in their order.
      paired: the dimensions of `y` that go with the weight's batch dimensions.
    """

    numbers: lax.GatherDimensionNumbers
    mode: Any
    fill: Any
    offset: tuple[int, ...]
    paired: tuple[int, ...]

    @property
    def _rank(self) -> int:
        return len(self.contract) + len(self.batch) + len(self.free)

    def _hidden(self, dims: Sequence[int]) -> tuple[int, ...]:
        """Where dimensions of `y` lie in `h`."""
        return tuple(d - sum(made < d for made in self.offset) for d in dims)

    def down(self, x: Array, f: Factor) -> Array:
        """See `Use`; the same lookup in the factor, whose slices are its ranks."""
        # what is out of bounds is not in the weight, whatever the equation fills it with
        return self._lookup(x, f, 0)

    def find(
        self,
        x: Array,
        factors: Mapping[str, Factor],
        make: Callable[[dict[str, Array]], Array],
    ) -> Array | None:
        """See `Use`; what fills places out of bounds cannot be made of parts."""
        if self.fill is not None or len(self.free) != 1:
            return None
        found = make({name: self._lookup(x, f, None) for name, f in factors.items()})
        return jnp.moveaxis(found, -1, self.offset[0])

    def _lookup(self, x: Array, f: Factor, fill: Any) -> Array:
        rank = x.ndim - 1 + len(self.numbers.offset_dims)
        numbers = self.numbers._replace(offset_dims=(*self.numbers.offset_dims, rank))
        w = f.form()
        sizes = (*(1,) * self._rank, w.shape[-1])
        h = lax.gather(w, x, numbers, sizes, mode=self.mode, fill_value=fill)
        return jnp.squeeze(h, self.offset)

    def up(self, h: Array, f: Factor) -> Array:
        """See `Use`."""
        paired = self._hidden(self.paired)
        n, (*spots, last) = len(self.batch), range(h.ndim)
        w = pick(f, (*self.batch, None, *self.free), self._rank)
        w = spread(w, tuple(h.shape[d] for d in paired))
        numbers = (((last,), (n,)), (paired, tuple(range(n))))
        hs, ws = placement(h), placement(w)[n + 1 :]
        rest = [d for d in spots if d not in paired]
        y = product(h, w, numbers, (*(hs[d] for d in (*paired, *rest)), *ws))
        kept = [d for d in range(y.ndim) if d not in self.offset]
        order = [*self.paired, *(d for d in kept if d not in self.paired), *self.offset]
        return jnp.transpose(y, [order.index(d) for d in range(y.ndim)])

    def read(self, y: Array, f: Factor) -> Array:
        """See `Use`."""
        n = len(self.batch)
        w = pick(f, (*self.batch, *self.free), self._rank)
        w = spread(w, tuple(y.shape[d] for d in self.paired))
        numbers = ((self.offset, tuple(range(n, w.ndim - 1))), (self.paired, tuple(range(n))))
        ys = placement(y)
        rest = [d for d in range(y.ndim) if d not in (*self.offset, *self.paired)]
        h = product(y, w, numbers, (*(ys[d] for d in (*self.paired, *rest)), None))
        order = [*self._hidden((*self.paired, *rest)), h.ndim - 1]
        return jnp.transpose(h, [order.index(d) for d in range(h.ndim)])

    def on_output(self, y: Array, f: Factor) -> Array:
        """See `Use`."""
        w = pick(f, (*self.batch, *self.free), self._rank)
        return align(w, self.places(y), y.ndim)

    def on_input(self, x: Array, f: Factor) -> Array:
        """See `Use`."""
        raise TypeError('the input of a lookup is an index: it cannot be scaled')

    def on_hidden(self, h: Array, f: Factor) -> Array:
        """See `Use`."""
        w = pick(f, self.batch, self._rank)
        return align(w, (*self._hidden(self.paired), h.ndim - 1), h.ndim)

    def outputs(self, y: Array) -> tuple[int, ...]:
        """See `Use`."""
        return self.offset

    def places(self, y: Array) -> tuple[int, ...]:
        """See `Use`."""
        return (*self.paired, *self.outputs(y))
