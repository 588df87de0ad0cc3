"""Numbers that count something."""

import operator
from typing import Any


def whole(name: str, number: Any, least: int = 1) -> int:
    """A count as Python has it: JSON knows no integer of NumPy, and a loop makes no half a step.

    Args:
      name: what it is called where it was given.
      number: an integer of Python, NumPy or JAX.
      least: the smallest that makes sense.

    Raises:
      TypeError: it is no integer; `True` is none.
      ValueError: it is smaller.
    """
    try:
        found = None if isinstance(number, bool) else operator.index(number)
    except TypeError:
        found = None
    if found is None:
        raise TypeError(f'{name} must be an integer: received {number!r}')
    if found < least:
        raise ValueError(f'{name} must be at least {least}: received {found}')
    return found
