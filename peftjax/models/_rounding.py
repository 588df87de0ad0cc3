"""Weights rounded to few bits while they are read, a part at a time: none is held whole."""

import itertools
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np

from peftjax._quantized import Quantized, Scheme
from peftjax.models._fill import Plan, aligned, part

PART = 2**20
"""About how many numbers are read at once."""

Seen = Callable[[np.ndarray, Quantized], None]


def rounded(
    plan: Plan, path: str, shape: jax.ShapeDtypeStruct, scheme: Scheme, seen: Seen | None = None
) -> Quantized:
    """A quantized parameter in host memory, read a part at a time.

    Args:
      plan: from `match`.
      path: of the parameter.
      shape: of the parameter; its dtype is what tensors are cast to before they are rounded.
      scheme: how it is rounded.
      seen: is called with each part and with what became of it.

    Returns:
      Codes and scales, equal to those of the whole: blocks lie along the last axis, which no part
      divides.

    Raises:
      ValueError: a parameter without axes.
    """
    whole = scheme.quantize(shape, path)
    held = {name: aligned(array.shape, array.dtype) for name, array in whole.parts.items()}
    for index in _parts(shape.shape, len(plan.sources[path].stack)):
        w = part(plan, path, index, shape.dtype)
        small = scheme.quantize(w, path)
        for name, array in small.parts.items():
            held[name][index[:-1]] = array
        if seen is not None:
            seen(w, small)
        del w, small  # before the next part is read
    return whole.made_of(held)


def _parts(shape: tuple[int, ...], depth: int) -> Iterator[tuple[slice, ...]]:
    """Rectangles that fill a shape: a layer, or some rows of one; each row whole."""
    stack, inner = shape[:depth], shape[depth:]
    whole = tuple(slice(0, size) for size in inner)
    cuts = [whole]
    if len(inner) > 1:
        count = -(-math.prod(inner) // PART)
        some = -(-inner[0] // count)
        starts = range(0, inner[0], some)
        cuts = [(slice(i, min(i + some, inner[0])), *whole[1:]) for i in starts]
    for at in itertools.product(*map(range, stack)):
        yield from ((*(slice(i, i + 1) for i in at), *cut) for cut in cuts)
