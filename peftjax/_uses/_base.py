"""What an equation does with a weight, as geometry.

A use contracts some dimensions of the weight with an input `x`, pairs others with it (experts),
and produces the rest in its output `y`. In these terms every method is written once, for dots in
any order, gathers, convolutions and ragged dots.

A hidden tensor `h` has the dimensions of `y`, with those produced by the weight replaced by one of
size `rank`. `down` and `up` work in the space of the weight, `up(down(x, a), b)` being what `x`
yields with the weight `a @ b`. `read` and `write` work on the output: `y -> h -> y`.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from peftjax._factor import Factor
from peftjax._layout import Full
from peftjax._types import Array


@dataclasses.dataclass(frozen=True)
class Use(abc.ABC):
    """One equation that consumes a weight linearly.

    Attributes:
      run: the equation itself: `run(x, w) -> y`.
      kind: what the site table calls it.
      contract: dimensions of the weight that the equation sums over.
      batch: dimensions of the weight that are paired with dimensions of `x` (experts).
      free: dimensions of the weight that it produces, in the order of the weight.
    """

    run: Callable[[Any, Any], Array]
    kind: str
    contract: tuple[int, ...]
    batch: tuple[int, ...]
    free: tuple[int, ...]

    @abc.abstractmethod
    def down(self, x: Array, f: Factor) -> Array:
        """`x -> h`, with a factor that has the batch and contracted dimensions and a rank."""

    @abc.abstractmethod
    def up(self, h: Array, f: Factor) -> Array:
        """`h -> y`, with a factor that has the batch and free dimensions and a rank."""

    @abc.abstractmethod
    def read(self, y: Array, f: Factor) -> Array:
        """`y -> h`, with a factor that has the batch and free dimensions and a rank."""

    def write(self, h: Array, f: Factor) -> Array:
        """`h -> y` for an `h` that came from `read`."""
        return self.up(h, f)

    def find(
        self,
        x: Array,
        factors: Mapping[str, Factor],
        make: Callable[[dict[str, Array]], Array],
    ) -> Array | None:
        """`x -> y` where only some rows of the weight are wanted, each made of parts.

        Args:
          x: the indices.
          factors: the parts, along all dimensions but that of the rows themselves.
          make: from the parts of some rows, `(*rows, part)`, to those rows, `(*rows, numbers)`.

        Returns:
          The rows in their places; `None` where all of the weight is wanted.
        """
        del x, factors, make
        return None

    @abc.abstractmethod
    def on_output(self, y: Array, f: Factor) -> Array:
        """A factor over batch and free dimensions, ready to broadcast against `y`."""

    @abc.abstractmethod
    def on_input(self, x: Array, f: Factor) -> Array:
        """A factor over batch and contracted dimensions, ready to broadcast against `x`."""

    @abc.abstractmethod
    def on_hidden(self, h: Array, f: Factor) -> Array:
        """A factor over batch dimensions with a rank, ready to broadcast against `h`."""

    @abc.abstractmethod
    def outputs(self, y: Array) -> tuple[int, ...]:
        """The dimensions of `y` that the weight produced."""

    def places(self, y: Array) -> tuple[int, ...]:
        """The dimensions of `y` along which the batch and free dimensions of the weight lie."""
        return (*range(len(self.batch)), *self.outputs(y))

    def spread(self, h: Array, y: Array) -> Array:
        """A hidden tensor of rank one, ready to broadcast against `y`."""
        return jnp.expand_dims(jnp.squeeze(h, -1), self.outputs(y))

    def summed(self, full: Full) -> bool:
        """Whether a factor has just the dimensions that `down` needs, batches apart."""
        return self._covers(full, self.contract, self.free)

    def produced(self, full: Full) -> bool:
        """Whether a factor has just the dimensions that `up`, `read` and `on_output` need."""
        return self._covers(full, self.free, self.contract)

    def _covers(self, full: Full, yes: tuple[int, ...], no: tuple[int, ...]) -> bool:
        return all(full[d] for d in yes) and not any(full[d] for d in no)
