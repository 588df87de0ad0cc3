"""Factors and tensors brought into the shapes that a use needs."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from peftjax._types import Array


def spread(f: Array, batch: tuple[int, ...]) -> Array:
    """A factor that some batch dimensions share, repeated along them."""
    return jnp.broadcast_to(f, (*batch, *f.shape[len(batch) :])) if batch else f


def align(f: Array, dims: tuple[int, ...], rank: int) -> Array:
    """Puts the dimensions of `f` at `dims` of a tensor of `rank` dimensions, ones elsewhere."""
    order = sorted(range(len(dims)), key=lambda i: dims[i])
    sizes = {dims[i]: f.shape[i] for i in order}
    f = f if order == sorted(order) else lax.transpose(f, order)
    return lax.reshape(f, [sizes.get(d, 1) for d in range(rank)])


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
