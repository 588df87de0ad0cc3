"""Whether a leaf that is added to the output of a layer is its bias: a number for each output.

The outputs of a layer are numbered as its leaf orders them, and so are those of the bias; at each
place of the sum both must have one number. These are views that take no room, and what was done
to the output is done to its numbers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from peftjax._layout import Labels
from peftjax._method import At
from peftjax._pending import Pending
from peftjax._standin import StandIn
from peftjax._types import Path


def owns(
    output: Pending, bias: StandIn, leaves: Mapping[Path, Any], taken: Callable[[StandIn], Any]
) -> bool:
    """Whether a leaf is the bias of all layers that an output comes from.

    Args:
      output: of one layer, or of a product of several leaves.
      bias: the leaf as it stands where it is added.
      leaves: all leaves, or their shapes and dtypes.
      taken: of a leaf where it stands, the axes along which one layer was cut out, and which.
    """
    added = _added(output, bias, leaves[bias.path].shape)
    layers = _gone(bias, leaves[bias.path].shape, taken(bias))
    return added is not None and all(
        _gone(at.view, leaves[at.view.path].shape, taken(at.view)) == layers
        and (made := _made(output, at, leaves[at.view.path].shape)) is not None
        and _alike(made, added)
        for at, _, _ in output.steps
    )


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two views of numbers from zero have the same number everywhere."""
    steps = zip(one.shape, one.strides, other.strides, strict=True)
    return one.shape == other.shape and all(a == b for n, a, b in steps if n > 1)


def _gone(view: StandIn, leaf: Sequence[int], taken: Mapping[int, int]) -> list[Any]:
    """The sizes of the axes along which a leaf was taken apart, and where, if that is fixed."""
    here = {axis for d, label in enumerate(view.dims) if view.shape[d] > 1 for axis in label}
    return [(n, taken.get(axis)) for axis, n in enumerate(leaf) if axis not in here and n > 1]


def _axes(labels: Labels, sizes: Sequence[int], leaf: Sequence[int]) -> list[int] | None:
    """The axis of the leaf that each dimension is; `None` where one is a part or a mixture."""
    axes = [axis for label in labels for axis in label]
    whole = len(axes) == len(labels) == len(set(axes))
    return axes if whole and [leaf[axis] for axis in axes] == list(sizes) else None


def _laid(shape: Sequence[int], dims: Sequence[int], order: Sequence[int]) -> np.ndarray:
    """Numbers from zero along some dimensions of a shape, of which the last in order runs fastest.

    Args:
      shape: of the whole.
      dims: along which the numbers lie.
      order: the same dimensions, as they are numbered.
    """
    sizes = [shape[d] for d in order]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    numbers = numbers.transpose([order.index(d) for d in sorted(dims)])
    ones = [n if d in dims else 1 for d, n in enumerate(shape)]
    return np.broadcast_to(numbers.reshape(ones), shape)


def _added(output: Pending, bias: StandIn, leaf: Sequence[int]) -> np.ndarray | None:
    """The numbers of a bias at each place of the sum, in the order in which it lies there."""
    shape = output.value.shape
    dims = [d for d, label in enumerate(bias.dims) if label and bias.shape[d] > 1]
    if _axes(tuple(bias.dims[d] for d in dims), [bias.shape[d] for d in dims], leaf) is None:
        return None
    return _laid(shape, dims, dims)


def _made(output: Pending, at: At, leaf: Sequence[int]) -> np.ndarray | None:
    """The numbers of the outputs of a layer at each place of the sum, in the order of its leaf."""
    y: Any = np.broadcast_to(0, output.value.shape)  # moves are of both, NumPy's and JAX's
    for undo, _ in reversed(output.moves):
        y = undo(y)
    made = zip((*at.use.batch, *at.use.free), at.use.places(y), strict=True)
    where = {d: place for d, place in made if at.view.shape[d] > 1}
    axes = _axes(tuple(at.view.dims[d] for d in where), [at.view.shape[d] for d in where], leaf)
    if axes is None or any(y.shape[place] != at.view.shape[d] for d, place in where.items()):
        return None
    paired = [d in at.use.batch for d in where]
    ranked = sorted(zip(paired, axes, where.values(), strict=True), key=lambda r: (not r[0], r[1]))
    numbers = _laid(y.shape, list(where.values()), [place for *_, place in ranked])
    moved: Any = numbers
    for _, redo in output.moves:
        moved = redo(moved)
    # a reshape that is no view has mixed the outputs with what they lie among
    return moved if not output.moves or np.may_share_memory(numbers, moved) else None
