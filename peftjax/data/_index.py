"""Positions of examples, as they are given to pick some."""

from collections.abc import Sequence

import numpy as np


def positions(index: Sequence[int] | np.ndarray) -> np.ndarray:
    """Positions as int64; what was meant as a mask is none, nor are halves.

    Args:
      index: `(m,)` integers.

    Raises:
      TypeError: they are something else.

    Example:
      >>> positions([2, 0])
      array([2, 0])
    """
    found = np.asarray(index)
    if not found.size:
        return np.zeros(found.shape, np.int64)
    if not np.issubdtype(found.dtype, np.integer):
        raise TypeError(
            f'examples are taken by position: an index must be integers, received {found.dtype}. '
            'np.flatnonzero makes positions of a mask'
        )
    return found.astype(np.int64)
