"""What a `config.json` must hold for a model to be made of it."""

from collections.abc import Iterable, Mapping
from typing import Any

Fields = Mapping[str, Any]


def check_settings(fields: Fields, required: Fields, model: str) -> None:
    """Refuses settings that change the computation in ways that a model does not have.

    Args:
      fields: of the file.
      required: what each must be, where it is given.
      model: what refuses them, for the message.

    Raises:
      ValueError: another value, by the field's name.
    """
    for name, value in required.items():
        received = fields.get(name)
        if received is not None and received != value:
            raise ValueError(
                f'config {name} must be {value!r} (or absent), got {received!r}: this {model} '
                'does not compute it.'
            )


def check_sizes(fields: Fields, names: Iterable[str]) -> None:
    """Refuses a file without the sizes that a model cannot be made without.

    Args:
      fields: of the file.
      names: of the sizes.

    Raises:
      ValueError: one is absent, null, or no size; by its name.
    """
    missing = [name for name in names if fields.get(name) is None]
    if missing:
        raise ValueError(f'config must hold {list(names)}; missing: {missing}.')
    for name in names:
        size(fields, name)


def size(fields: Fields, name: str) -> int:
    """A size of the file.

    Args:
      fields: of the file.
      name: of the field.

    Returns:
      The size.

    Raises:
      ValueError: it is absent, null, or no size.

    Example:
      >>> size({'hidden_size': 16}, 'hidden_size')
      16
    """
    value = fields.get(name)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f'config {name} must be a whole number above zero, got {value!r}.')
    return value
