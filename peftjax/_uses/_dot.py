"""`dot_general`."""

import dataclasses
import math
from typing import Any

import jax
from jax import lax

from peftjax._factor import Factor, pick
from peftjax._types import Array
from peftjax._uses._base import Use
from peftjax._uses._shapes import align, placement, product, spread


def _mergeable(h: Array) -> bool:
    """Whether to merge all dimensions of a hidden tensor but the last, as a CPU wants it.

    The gradient of `b` sums over all of them. XLA on CPUs sums over one dimension in place, but
    transposes the whole gradient of the output first where there are several. Elsewhere that costs
    nothing, and apart the dimensions may be sharded each on its own.
    """
    whole = all(axis is None for axis in placement(h)[:-1])
    return h.ndim > 2 and whole and jax.default_backend() == 'cpu'


@dataclasses.dataclass(frozen=True)
class Dot(Use):
    """`dot_general`, the weight on either side.

    Attributes:
      weight_first: whether the weight is the left operand.
      x_contract: dimensions of `x` summed over, in the order of `contract`.
      x_batch: dimensions of `x` paired with the weight's, in the order of `batch`.
      precision: of the product.
      wide: the dtype that the equation asks of its output, if it is not the operands'.
    """

    weight_first: bool
    x_contract: tuple[int, ...]
    x_batch: tuple[int, ...]
    precision: Any
    wide: Any

    @property
    def _rank(self) -> int:
        return len(self.contract) + len(self.batch) + len(self.free)

    def down(self, x: Array, f: Factor) -> Array:
        """See `Use`."""
        n = len(self.batch)
        w = pick(f, (*self.batch, *self.contract), self._rank)
        w = spread(w, tuple(x.shape[d] for d in self.x_batch))
        numbers = (
            (self.x_contract, tuple(range(n, n + len(self.contract)))),
            (self.x_batch, tuple(range(n))),
        )
        spec = placement(x)
        rest = [d for d in range(x.ndim) if d not in (*self.x_contract, *self.x_batch)]
        out = (*(spec[d] for d in (*self.x_batch, *rest)), None)
        return product(x, w, numbers, out, precision=self.precision)

    def up(self, h: Array, f: Factor) -> Array:
        """See `Use`."""
        n = len(self.batch)
        w = spread(pick(f, (*self.batch, None, *self.free), self._rank), h.shape[:n])
        paired = tuple(range(n))
        numbers = (((h.ndim - 1,), (n,)), (paired, paired))
        how = {'precision': self.precision, 'preferred_element_type': self.wide}
        hs, ws = placement(h)[:-1], placement(w)[n + 1 :]
        if self.weight_first:
            swapped = ((numbers[0][1], numbers[0][0]), numbers[1])
            return product(w, h, swapped, (*hs[:n], *ws, *hs[n:]), **how)
        if not n and _mergeable(h):
            rows = lax.reshape(h, (math.prod(h.shape[:-1]), h.shape[-1]))
            y = product(rows, w, (((1,), (0,)), ((), ())), None, **how)
            return lax.reshape(y, (*h.shape[:-1], *w.shape[1:]))
        return product(h, w, numbers, (*hs, *ws), **how)

    def read(self, y: Array, f: Factor) -> Array:
        """See `Use`."""
        n = len(self.batch)
        w = spread(pick(f, (*self.batch, *self.free), self._rank), y.shape[:n])
        made = tuple(range(n, n + len(self.free)))
        numbers = ((self.outputs(y), made), (tuple(range(n)), tuple(range(n))))
        spec = placement(y)
        rest = [d for d in range(n, y.ndim) if d not in self.outputs(y)]
        out = (*spec[:n], *(spec[d] for d in rest), None)
        return product(y, w, numbers, out, precision=self.precision)

    def on_output(self, y: Array, f: Factor) -> Array:
        """See `Use`."""
        w = pick(f, (*self.batch, *self.free), self._rank)
        return align(w, self.places(y), y.ndim)

    def on_input(self, x: Array, f: Factor) -> Array:
        """See `Use`."""
        w = pick(f, (*self.batch, *self.contract), self._rank)
        return align(w, (*self.x_batch, *self.x_contract), x.ndim)

    def on_hidden(self, h: Array, f: Factor) -> Array:
        """See `Use`."""
        w = pick(f, self.batch, self._rank)
        return align(w, (*range(len(self.batch)), h.ndim - 1), h.ndim)

    def outputs(self, y: Array) -> tuple[int, ...]:
        """See `Use`."""
        first = len(self.batch) if self.weight_first else y.ndim - len(self.free)
        return tuple(range(first, first + len(self.free)))
