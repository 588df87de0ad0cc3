"""What a case of the zoo is, and its registry."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

EFFICIENT = ('efficient',)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One apply function with arguments, and what the engine should make of it.

    Attributes:
      fn: `fn(params, *args, **kwargs)`; `args[0]` is the data, over which tests may vmap.
      params: pytree of float32 arrays of order one.
      args: positional arguments.
      kwargs: keyword arguments; what is not an array must stay static.
      target: regex for the leaves that are adapted.
      served: for every adapted leaf, how its uses should be served.
      tolerance: relative to the largest value, against the merged model.
      reverse: whether JAX can differentiate it in reverse mode.
      forward: whether JAX can differentiate it in forward mode.
      twice: whether JAX can differentiate it twice.
      mapped: whether JAX can vmap it.
      meshed: whether it has a mesh of its own, to which its arguments are copied.
      notes: what is special.
    """

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    target: str = '.*'
    served: tuple[str, ...] = EFFICIENT
    tolerance: float = 1e-5
    reverse: bool = True
    forward: bool = True
    twice: bool = True
    mapped: bool = True
    meshed: bool = False
    notes: str = ''

    @property
    def x(self) -> Any:
        """The data."""
        return self.args[0]

    def base(self, params: Any, x: Any) -> Any:
        """The apply function, everything but the data closed over."""
        return self.fn(params, x, *self.args[1:], **self.kwargs)

    def adapted(self, peft: Any, params: Any, phi: Any, x: Any) -> Any:
        """The same, wrapped."""
        return peft.wrap(self.fn)(params, phi, x, *self.args[1:], **self.kwargs)


class Zoo(Mapping[str, Case]):
    """Cases by name, each built when it is first asked for."""

    def __init__(self) -> None:
        self._makers: dict[str, Callable[[], Case]] = {}

    def __call__(self, maker: Callable[[], Case]) -> Callable[[], Case]:
        """Registers a maker under its own name."""
        self._makers[maker.__name__] = functools.cache(maker)
        return maker

    def wing(self, module: str) -> list[str]:
        """The names of the cases that a module makes."""
        return [name for name, maker in self._makers.items() if maker.__module__ == module]

    def __getitem__(self, name: str) -> Case:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


APPLIES = Zoo()


def normal(seed: int, *shape: int, fan: int = 1) -> jax.Array:
    """Normal numbers of variance `1 / fan`."""
    draw = np.random.default_rng(seed).normal(size=shape) / np.sqrt(fan)
    return jnp.asarray(draw, jnp.float32)


def ids(seed: int, high: int, *shape: int) -> jax.Array:
    """Random token ids."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, high, shape), jnp.int32)


X = normal(0, 3, 6)
TOKENS = ids(1, 7, 3, 5)


def bare(fn: Callable[..., Any], w: jax.Array, *args: Any, **more: Any) -> Case:
    """A case with one weight: `fn(w, *args)`."""
    return Case(fn=lambda params, *args: fn(params['w'], *args), params={'w': w}, args=args, **more)
