"""Where an iterator stands: by `state` and `restore`, or by grain's `get_state` and `set_state`."""

import json
from collections.abc import Mapping
from typing import Any


def position(batches: Any) -> Any:
    """Where an iterator stands, as JSON keeps it.

    Raises:
      TypeError: it does not say, or says what JSON does not keep.
    """
    return kept(f'where {type(batches).__name__} stands', _methods(batches)[0]())


def kept(what: str, value: Any) -> Any:
    """A value as it comes back from JSON.

    Raises:
      TypeError: JSON does not keep it.
    """
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f'{what} must be what JSON keeps{_odd(value)}: {error}. Use numbers of Python, '
            'strings, lists and dicts'
        ) from error


def _odd(value: Any) -> str:
    """Which entry of a dict it is that JSON does not keep."""
    for name, own in value.items() if isinstance(value, Mapping) else ():
        try:
            json.dumps({name: own})
        except (TypeError, ValueError):
            return f', and {name!r} is {own!r:.80}'
    return ''


def put(batches: Any, state: Any) -> None:
    """Puts an iterator where another one stood.

    Raises:
      TypeError: it does not say where it stands.
    """
    _methods(batches)[1](state)


def _methods(batches: Any) -> tuple[Any, Any]:
    for tell, take in (('state', 'restore'), ('get_state', 'set_state')):
        if hasattr(batches, tell) and hasattr(batches, take):
            return getattr(batches, tell), getattr(batches, take)
    raise TypeError(
        'to go on exactly, batches must say where they stand: by state and restore, or by '
        f"grain's get_state and set_state; got {type(batches).__name__}"
    )
