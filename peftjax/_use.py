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
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from peftjax._factor import Factor, pick
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


def _spread(f: Array, batch: tuple[int, ...]) -> Array:
    """A factor that some batch dimensions share, repeated along them."""
    return jnp.broadcast_to(f, (*batch, *f.shape[len(batch) :])) if batch else f


def product(x: Array, f: Array, numbers: Any, out: tuple[Any, ...] | None, **how: Any) -> Array:
    """A dot whose result is placed as `out` says, where mesh axes are explicit."""
    mesh = jax.typeof(x).sharding.mesh
    if out is not None and any(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types):
        how['out_sharding'] = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*out))
    return lax.dot_general(x, f, numbers, **how)


def placement(array: Array) -> tuple[Any, ...]:
    """The mesh axes of each dimension."""
    spec = tuple(jax.typeof(array).sharding.spec)
    return (*spec, *(None,) * (array.ndim - len(spec)))


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
        w = _spread(w, tuple(x.shape[d] for d in self.x_batch))
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
        w = _spread(pick(f, (*self.batch, None, *self.free), self._rank), h.shape[:n])
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
        w = _spread(pick(f, (*self.batch, *self.free), self._rank), y.shape[:n])
        made = tuple(range(n, n + len(self.free)))
        numbers = ((self.outputs(y), made), (tuple(range(n)), tuple(range(n))))
        spec = placement(y)
        rest = [d for d in range(n, y.ndim) if d not in self.outputs(y)]
        out = (*spec[:n], *(spec[d] for d in rest), None)
        return product(y, w, numbers, out, precision=self.precision)

    def on_output(self, y: Array, f: Factor) -> Array:
        """See `Use`."""
        w = pick(f, (*self.batch, *self.free), self._rank)
        return _align(w, (*range(len(self.batch)), *self.outputs(y)), y.ndim)

    def on_input(self, x: Array, f: Factor) -> Array:
        """See `Use`."""
        w = pick(f, (*self.batch, *self.contract), self._rank)
        return _align(w, (*self.x_batch, *self.x_contract), x.ndim)

    def on_hidden(self, h: Array, f: Factor) -> Array:
        """See `Use`."""
        w = pick(f, self.batch, self._rank)
        return _align(w, (*range(len(self.batch)), h.ndim - 1), h.ndim)

    def outputs(self, y: Array) -> tuple[int, ...]:
        """See `Use`."""
        first = len(self.batch) if self.weight_first else y.ndim - len(self.free)
        return tuple(range(first, first + len(self.free)))


def _align(f: Array, dims: tuple[int, ...], rank: int) -> Array:
    """Puts the dimensions of `f` at `dims` of a tensor of `rank` dimensions, ones elsewhere."""
    order = sorted(range(len(dims)), key=lambda i: dims[i])
    sizes = {dims[i]: f.shape[i] for i in order}
    f = f if order == sorted(order) else lax.transpose(f, order)
    return lax.reshape(f, [sizes.get(d, 1) for d in range(rank)])


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
        w = _spread(w, tuple(h.shape[d] for d in paired))
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
        w = _spread(w, tuple(y.shape[d] for d in self.paired))
        numbers = ((self.offset, tuple(range(n, w.ndim - 1))), (self.paired, tuple(range(n))))
        ys = placement(y)
        rest = [d for d in range(y.ndim) if d not in (*self.offset, *self.paired)]
        h = product(y, w, numbers, (*(ys[d] for d in (*self.paired, *rest)), None))
        order = [*self._hidden((*self.paired, *rest)), h.ndim - 1]
        return jnp.transpose(h, [order.index(d) for d in range(h.ndim)])

    def on_output(self, y: Array, f: Factor) -> Array:
        """See `Use`."""
        w = pick(f, (*self.batch, *self.free), self._rank)
        return _align(w, (*self.paired, *self.offset), y.ndim)

    def on_input(self, x: Array, f: Factor) -> Array:
        """See `Use`."""
        raise TypeError('the input of a lookup is an index: it cannot be scaled')

    def on_hidden(self, h: Array, f: Factor) -> Array:
        """See `Use`."""
        w = pick(f, self.batch, self._rank)
        return _align(w, (*self._hidden(self.paired), h.ndim - 1), h.ndim)

    def outputs(self, y: Array) -> tuple[int, ...]:
        """See `Use`."""
        return self.offset


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
        kernel = self._kernel(f, self.kernel_in)
        spatial = kernel.ndim - 2
        plain = {
            'window_strides': (1,) * spatial,
            'padding': ((0, 0),) * spatial,
            'lhs_dilation': (1,) * spatial,
            'rhs_dilation': (1,) * spatial,
            'feature_group_count': groups,
        }
        numbers = self.params['dimension_numbers']
        # the hidden tensor has the layout of the output
        numbers = lax.ConvDimensionNumbers(numbers.out_spec, numbers.rhs_spec, numbers.out_spec)
        params = {**self.params, **plain, 'dimension_numbers': numbers}
        return lax.conv_general_dilated(h, kernel, **params)

    def on_output(self, y: Array, f: Factor) -> Array:
        """See `Use`."""
        return _align(pick(f, self.free, self._rank), (self.feature,), y.ndim)

    def on_input(self, x: Array, f: Factor) -> Array:
        """See `Use`."""
        w = pick(f, (self.kernel_in,), self._rank)
        return _align(jnp.tile(w, self.groups), (self.x_feature,), x.ndim)

    def on_hidden(self, h: Array, f: Factor) -> Array:
        """See `Use`."""
        return _align(pick(f, (), self._rank), (self.feature,), h.ndim)

    def spread(self, h: Array, y: Array) -> Array:
        """See `Use`."""
        del y
        return h

    def outputs(self, y: Array) -> tuple[int, ...]:
        """See `Use`."""
        return (self.feature,)


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
        return lax.ragged_dot(x, _spread(f, self.sizes.shape), self.sizes, **how)

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
        f = _spread(f, self.sizes.shape)
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
        return _align(f.form(), self.outputs(y), y.ndim)

    def on_input(self, x: Array, f: Factor) -> Array:
        """See `Use`."""
        raise TypeError('a named value has no input')

    def on_hidden(self, h: Array, f: Factor) -> Array:
        """See `Use`."""
        return _align(pick(f, (), len(self.free)), (h.ndim - 1,), h.ndim)

    def outputs(self, y: Array) -> tuple[int, ...]:
        """See `Use`."""
        return tuple(range(y.ndim - len(self.free), y.ndim))
