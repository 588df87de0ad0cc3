"""`conv_general_dilated`."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from peftjax._factor import Factor, pick
from peftjax._types import Array
from peftjax._uses._base import Use
from peftjax._uses._shapes import align


@dataclasses.dataclass(frozen=True)
class Conv(Use):
    """`conv_general_dilated`, the weight being the kernel.

    Attributes:
      params: the other parameters of the equation.
      feature: the dimension of `y` that holds the features.
      x_feature: the dimension of `x` that holds the features.
      kernel_in: the kernel's dimension of input features (of one group).
      groups: the number of feature groups.
    """

    params: Any
    feature: int
    x_feature: int
    kernel_in: int
    groups: int

    @property
    def _rank(self) -> int:
        return len(self.contract) + 1

    def down(self, x: Array, f: Factor) -> Array:
        """See `Use`."""
        (out,) = self.free
        kernel = self._kernel(f, out)
        repeats = [self.groups if d == out else 1 for d in range(kernel.ndim)]
        return lax.conv_general_dilated(x, jnp.tile(kernel, repeats), **self.params)

    def up(self, h: Array, f: Factor) -> Array:
        """See `Use`."""
        return self._pointwise(h, f, self.groups)

    def read(self, y: Array, f: Factor) -> Array:
        """See `Use`."""
        w = pick(f, self.free, self._rank)
        h = lax.dot_general(y, w, (((self.feature,), (0,)), ((), ())))
        return jnp.moveaxis(h, -1, self.feature)

    def write(self, h: Array, f: Factor) -> Array:
        """See `Use`."""
        return self._pointwise(h, f, 1)

    def _kernel(self, f: Factor, features: int) -> Array:
        """A factor as a kernel, its rank standing for one of the dimensions of features."""
        return pick(f, [None if d == features else d for d in range(self._rank)], self._rank)

    def _pointwise(self, h: Array, f: Factor, groups: int) -> Array:
        """Hidden features to output features at each place, group by group.

        A product, not a convolution with a kernel of size one: XLA gives wrong numbers for that
        with several groups where the kernel is split over a mesh by its outputs.
        """
        (out,) = self.free
        w = pick(f, (None, out), self._rank)
        rank, made = w.shape  # sizes are told: an empty batch leaves none to be found
        w = jnp.reshape(w, (rank, groups, made // groups))
        h = jnp.moveaxis(h, self.feature, -1)
        h = jnp.reshape(h, (*h.shape[:-1], groups, rank))
        y = jnp.einsum('...gr,rgo->...go', h, w)
        return jnp.moveaxis(jnp.reshape(y, (*y.shape[:-2], made)), -1, self.feature)

    def on_output(self, y: Array, f: Factor) -> Array:
        """See `Use`."""
        return align(pick(f, self.free, self._rank), (self.feature,), y.ndim)

    def on_input(self, x: Array, f: Factor) -> Array:
        """See `Use`."""
        w = pick(f, (self.kernel_in,), self._rank)
        return align(jnp.tile(w, self.groups), (self.x_feature,), x.ndim)

    def on_hidden(self, h: Array, f: Factor) -> Array:
        """See `Use`."""
        return align(pick(f, (), self._rank), (self.feature,), h.ndim)

    def spread(self, h: Array, y: Array) -> Array:
        """See `Use`."""
        del y
        return h

    def outputs(self, y: Array) -> tuple[int, ...]:
        """See `Use`."""
        return (self.feature,)
