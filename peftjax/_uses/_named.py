"""Named values."""

import dataclasses

from peftjax._factor import Factor, pick
from peftjax._types import Array
from peftjax._uses._base import Use
from peftjax._uses._shapes import align, placement, product


@dataclasses.dataclass(frozen=True)
class Named(Use):
    """A value that the model names with `checkpoint_name`: an output without a weight.

    Its last dimensions, those of one token, count as free dimensions of a weight that is not there.
    """

    def down(self, x: Array, f: Factor) -> Array:
        """See `Use`."""
        raise TypeError('a named value has no input')

    def up(self, h: Array, f: Factor) -> Array:
        """See `Use`."""
        w = pick(f, (None, *self.free), len(self.free))
        numbers = (((h.ndim - 1,), (0,)), ((), ()))
        return product(h, w, numbers, (*placement(h)[:-1], *placement(w)[1:]))

    def read(self, y: Array, f: Factor) -> Array:
        """See `Use`."""
        made = self.outputs(y)
        out = (*placement(y)[: y.ndim - len(made)], None)
        return product(y, f.form(), ((made, self.free), ((), ())), out)

    def on_output(self, y: Array, f: Factor) -> Array:
        """See `Use`."""
        return align(f.form(), self.outputs(y), y.ndim)

    def on_input(self, x: Array, f: Factor) -> Array:
        """See `Use`."""
        raise TypeError('a named value has no input')

    def on_hidden(self, h: Array, f: Factor) -> Array:
        """See `Use`."""
        return align(pick(f, (), len(self.free)), (h.ndim - 1,), h.ndim)

    def outputs(self, y: Array) -> tuple[int, ...]:
        """See `Use`."""
        return tuple(range(y.ndim - len(self.free), y.ndim))
