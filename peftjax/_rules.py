"""Rules over paths: how the leaves of a model are split over the axes of a mesh."""

import math
from collections.abc import Sequence

from jax.sharding import Mesh, PartitionSpec

from peftjax import _paths
from peftjax._types import Path

Rule = tuple[str, PartitionSpec]
"""A regular expression searched in paths, and how the last axes of a leaf are split that it finds.
The first rule that finds a path counts; what none finds lies whole on every device."""


def spec_of(rules: Sequence[Rule], path: Path, shape: Sequence[int]) -> PartitionSpec:
    """What the rules say of a leaf, one entry for each of its axes.

    Raises:
      ValueError: a rule tells of more axes than the leaf has.
    """
    for pattern, spec in rules:
        if _paths.matches(pattern, path):
            if len(spec) > len(shape):
                raise ValueError(
                    f'a rule tells how the last axes of a leaf are split; {pattern!r} tells of '
                    f'{len(spec)}, {path!r} has shape {tuple(shape)}. Shorten it, or let an '
                    'earlier rule find that path'
                )
            return PartitionSpec(*(None,) * (len(shape) - len(spec)), *spec)
    return PartitionSpec(*(None,) * len(shape))


def parts(entry: str | tuple[str, ...] | None, mesh: Mesh) -> int:
    """Into how many parts an entry of a spec splits an axis."""
    names = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(mesh.shape[name] for name in names)
