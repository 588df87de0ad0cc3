"""The fields of methods, checked and brought into the one form in which they are stored."""

import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np


def settle(method: Any, **fields: Any) -> None:
    """Puts other forms in place of what a frozen method was given, while it is made."""
    for name, value in fields.items():
        object.__setattr__(method, name, value)


def dtype_name(who: str, dtype: Any) -> str:
    """The name of the floating dtype of phi, given as a name, a scalar type or a dtype.

    Raises:
      ValueError: it is none.
    """
    try:
        found = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(
            f"{who}: dtype must be a floating one, such as 'float32' or 'bfloat16'; got {dtype!r}"
        )
    return found.name


def pairs(who: str, field: str, given: Any) -> tuple[tuple[str, Any], ...]:
    """Settings by name as pairs; a dict says them too.

    Raises:
      ValueError: they are no pairs of a string and a value.
    """
    each = tuple(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(each, tuple | list) or not all(map(_is_pair, each)):
        raise ValueError(
            f"{who}: {field} must be pairs, such as (('query', 4),) or {{'query': 4}}; "
            f'got {given!r}'
        )
    return tuple((name, plain(value)) for name, value in each)


def number(who: str, field: str, given: Any) -> Any:
    """A finite number, as one of Python's.

    Raises:
      ValueError: it is none.
    """
    value = plain(given)
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f'{who}: {field} must be a finite number; got {given!r}')
    return value


def positive(who: str, field: str, given: Any) -> Any:
    """A finite number above zero.

    Raises:
      ValueError: it is none.
    """
    value = number(who, field, given)
    if value <= 0:
        raise ValueError(f'{who}: {field} must be positive; got {given!r}')
    return value


def plain(value: Any) -> Any:
    """A number of NumPy as one of Python, which is what JSON holds."""
    return value.item() if isinstance(value, np.generic) else value


def _is_pair(one: Any) -> bool:
    return isinstance(one, tuple | list) and len(one) == 2 and isinstance(one[0], str)
