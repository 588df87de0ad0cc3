"""Frozen dataclasses of plain values as JSON, and back: by an explicit table of classes.

A dataclass becomes `{"ItsName": {field: value}}`, a tuple a list. Nothing is looked up by a name
from the file but in the table that the caller gives.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Known = Mapping[str, type]


def encode(value: Any, where: str = '') -> Any:
    """What `json.dumps` takes, equal after `decode`.

    Args:
      value: None, bool, int, float, str, a tuple or a frozen dataclass of such.
      where: the field, for error messages.

    Raises:
      TypeError: a value of another kind.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {'float': str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [encode(one, where) for one in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = type(value).__name__
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return {name: {key: encode(one, f'{name}.{key}') for key, one in fields.items()}}
    raise TypeError(
        f'only None, bool, int, float, str and tuples of them can be saved; {where or "it"} is '
        f'{value!r:.80} ({type(value).__name__}). Give the method plain values'
    )


def decode(found: Any, known: Known) -> Any:
    """The value that `encode` wrote.

    Args:
      found: as from `json.loads`.
      known: the classes that may be made, by name.

    Raises:
      ValueError: a class or a field is unknown, a field is missing, or the class refuses a value.
    """
    if isinstance(found, list):
        return tuple(decode(one, known) for one in found)
    if not isinstance(found, dict):
        return found
    name, body = next(iter(found.items())) if len(found) == 1 else ('', None)
    if name == 'float' and body in ('inf', '-inf', 'nan'):
        return float(body)
    cls = known.get(name)
    if cls is None or not isinstance(body, dict):
        raise ValueError(
            f'a saved value must be of a known class; got {list(found)!r:.80}. '
            f'Known are {", ".join(sorted(known))}: pass a method of your own as methods=(Class,)'
        )
    _check_fields(cls, body)
    try:
        return cls(**{key: decode(one, known) for key, one in body.items()})
    except (TypeError, AttributeError) as error:
        raise ValueError(f'{name} refuses its saved fields: {error}') from error


def _check_fields(cls: type, body: Mapping[str, Any]) -> None:
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    unknown = [key for key in body if key not in fields]
    missing = [
        key
        for key, field in fields.items()
        if key not in body
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if unknown or missing:
        raise ValueError(
            f'{cls.__name__} must have the fields {", ".join(fields)}; '
            f'unknown: {", ".join(unknown) or "none"}, missing: {", ".join(missing) or "none"}. '
            'A newer peftjax may have saved it: upgrade'
        )
