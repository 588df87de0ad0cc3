"""`ragged_dot`."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from peftjax._factor import Factor, pick
from peftjax._types import Array
from peftjax._uses._base import Use
from peftjax._uses._shapes import spread


@dataclasses.dataclass(frozen=True)
class Ragged(Use):
    """`ragged_dot`: rows of `x` `(m, in)` meet the matrix of their group `(groups, in, out)`.

    Attributes:
      sizes: the rows of each group.
      precision: of the product.
      wide: the dtype that the equation asks of its output, if it is not the operands'.
    """

    sizes: Array
    precision: Any
    wide: Any

    def _dot(self, x: Array, f: Array, wide: Any = None) -> Array:
        how = {'precision': self.precision, 'preferred_element_type': wide}
        return lax.ragged_dot(x, spread(f, self.sizes.shape), self.sizes, **how)

    def down(self, x: Array, f: Factor) -> Array:
        """See `Use`."""
        return self._dot(x, pick(f, (0, 1), 3))

    def up(self, h: Array, f: Factor) -> Array:
        """See `Use`."""
        return self._dot(h, pick(f, (0, None, 2), 3), self.wide)

    def read(self, y: Array, f: Factor) -> Array:
        """See `Use`."""
        return self._dot(y, pick(f, (0, 2), 3))

    def _rows(self, f: Array, count: int) -> Array:
        f = spread(f, self.sizes.shape)
        return jnp.repeat(f, self.sizes, axis=0, total_repeat_length=count)

    def on_output(self, y: Array, f: Factor) -> Array:
        """See `Use`."""
        return self._rows(pick(f, (0, 2), 3), y.shape[0])

    def on_input(self, x: Array, f: Factor) -> Array:
        """See `Use`."""
        return self._rows(pick(f, (0, 1), 3), x.shape[0])

    def on_hidden(self, h: Array, f: Factor) -> Array:
        """See `Use`."""
        return self._rows(pick(f, (0,), 3), h.shape[0])

    def outputs(self, y: Array) -> tuple[int, ...]:
        """See `Use`."""
        return (1,)
