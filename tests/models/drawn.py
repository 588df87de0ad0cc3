"""Weights that are the same in both worlds and on every machine, of names and shapes alone."""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np


def draw(shapes: Mapping[str, Sequence[int]], deviation: float) -> dict[str, np.ndarray]:
    """Normal tensors; vectors are norms and biases, and lie around one.

    `RandomState` draws the same in every version of NumPy; a generator need not.
    """
    tensors = {}
    for name, shape in shapes.items():
        fresh = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
        tensors[name] = np.float32(1 + 0.3 * fresh if len(shape) == 1 else deviation * fresh)
    return tensors
