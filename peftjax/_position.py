"""Where an iterator stands: by `state` and `restore`, or by grain's `get_state` and `set_state`."""

from typing import Any


def position(batches: Any) -> Any:
    """Where an iterator stands, as JSON keeps it.

    Raises:
      TypeError: it does not say.
    """
    return _methods(batches)[0]()


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
