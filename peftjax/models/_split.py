"""Activations split by rows, where a mesh is set."""

import math

import jax
from jax.sharding import AxisType, PartitionSpec

BATCH = ('data', 'fsdp')
"""Axes of a mesh that split batches."""


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
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    names = tuple(name for name in BATCH if kinds.get(name) == AxisType.Auto)
    if not names or x.shape[0] % math.prod(mesh.shape[name] for name in names):
        return x
    free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(names, *free))
