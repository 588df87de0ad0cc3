"""Where phi lies: beside the weights that it changes."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from peftjax import _processes
from peftjax._chain import Chain
from peftjax._method import Method
from peftjax._quantized import Quantized
from peftjax._sites import Site
from peftjax._types import Path, Phi, PyTree


def shardings(
    method: Method | Chain,
    sites: Iterable[tuple[Site, ...]],
    leaves: Mapping[Path, Any],
    phi: Phi,
) -> PyTree | None:
    """A sharding for each array of phi.

    Args:
      method: the method, or chain of methods.
      sites: for each part of it, the sites that it adapts.
      leaves: of theta by path: arrays, or shapes with shardings.
      phi: arrays or shapes.

    Returns:
      The tree of phi; None where theta lies on no mesh.
    """
    placed = {path: _of(leaf) for path, leaf in leaves.items()}
    whole = replicated(placed.values())
    if whole is None:
        return None
    tree: Any = jax.tree.map(lambda _: whole, phi)
    for (keys, part), chosen in zip(method.parts, sites, strict=True):
        mine = tree
        for key in keys:
            mine = mine[key]
        for site in chosen:
            where = placed.get(site.path)
            if isinstance(where, NamedSharding):
                for name, axes in part.axes(site).items():
                    if name in mine[site.path]:
                        mine[site.path][name] = _along(where, axes)
    return tree


def replicated(found: Iterable[Any]) -> NamedSharding | None:
    """Whole on every device of the mesh that something lies on, if it does."""
    meshes = (where.mesh for where in found if isinstance(where, NamedSharding))
    mesh = next(meshes, None)
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def on_a_mesh(leaves: Iterable[Any]) -> bool:
    """Whether a leaf of theta lies on a mesh."""
    return any(isinstance(_of(leaf), NamedSharding) for leaf in leaves)


def beside(tree: PyTree, others: PyTree) -> PyTree:
    """Arrays, those on no mesh copied to the one that others lie on, whole on every device."""
    whole = replicated(_of(leaf) for leaf in jax.tree.leaves(others))
    if whole is None:
        return tree
    stays = lambda leaf: isinstance(leaf, Tracer) or isinstance(_of(leaf), NamedSharding)
    return jax.tree.map(lambda leaf: leaf if stays(leaf) else _processes.put(leaf, whole), tree)


def _of(leaf: Any) -> Sharding | None:
    """Where a leaf of theta lies: the codes of a quantized one do as the weight would."""
    if isinstance(leaf, Quantized):
        leaf = leaf.codes
    return None if isinstance(leaf, Tracer) else getattr(leaf, 'sharding', None)


def _along(where: NamedSharding, axes: tuple[int | None, ...]) -> NamedSharding:
    spec = dict(enumerate(where.spec))
    mine = [None if axis is None else spec.get(axis) for axis in axes]
    while mine and mine[-1] is None:  # as JAX writes what a step gives back
        mine.pop()
    return NamedSharding(where.mesh, PartitionSpec(*mine))
