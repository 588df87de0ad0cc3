"""What the axes of a mesh are called, and which of those that are set leave XLA the choice."""

import jax
from jax.sharding import AxisType

ROWS = ('data', 'fsdp')
"""Axes that split the rows of a batch."""

AXES = (*ROWS, 'model')
"""Axes that mean something. `data` splits batches. `model` splits each product. `fsdp` splits
batches, and keeps a part of each weight, which is gathered where it is used."""


def automatic() -> dict[str, int]:
    """Sizes of the axes, of the mesh that is set, along which XLA decides where arrays lie."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto}
