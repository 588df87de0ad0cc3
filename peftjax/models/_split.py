"""Activations split by rows, and the head whole along them, where a mesh is set."""

import math

import jax
from jax.sharding import PartitionSpec

from peftjax._mesh_axes import ROWS, automatic


def split_rows(x: jax.Array) -> jax.Array:
    """Keeps the rows of an activation on the devices that have those of the batch.

    Left to itself the partitioner may split the width of the residual stream instead, as the
    weights beside it are along `fsdp`: then every device computes with all rows, and sums follow
    every product. Where `jax.set_mesh` set no mesh with such axes, nothing is asked for.

    Args:
      x: `(batch, …)`.

    Returns:
      The same.
    """
    sizes = automatic()
    names = tuple(name for name in ROWS if name in sizes)
    if not names or x.shape[0] % math.prod(sizes[name] for name in names):
        return x
    free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(names, *free))


def gathered_head(weight: jax.Array) -> jax.Array:
    """Gathers a head that is kept in parts along `fsdp`, once, whatever loop uses it.

    A fused loss goes through the head chunk by chunk, and the partitioner would gather it for each.
    Where `jax.set_mesh` set no mesh with that axis, nothing is asked for.

    Args:
      weight: `(hidden_size, vocab_size)`.

    Returns:
      The same, split by its vocabulary along `model` at most.
    """
    sizes = automatic()
    if 'fsdp' not in sizes:
        return weight
    split = 'model' in sizes and weight.shape[1] % sizes['model'] == 0
    return jax.lax.with_sharding_constraint(weight, PartitionSpec(None, 'model' if split else None))
