"""A method's own numbers as options: what `tune` and `plan` take, for any kind of model.

An option is a field of methods. Which methods take it is asked of the methods themselves.
"""

import argparse
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from peftjax import Method
from peftjax.cli._numbers import count, part, positive

Kind = TypeVar('Kind', bound=Method | None)

FIELDS = {
    'rank': 'rank',
    'alpha': 'alpha',
    'dropout': 'dropout',
    'reduction': 'reduction',
    'virtual_tokens': 'length',
    'target': 'target',
    'feedforward': 'feedforward',
}
"""Options, and the fields that they are."""


def add(sub: argparse.ArgumentParser) -> None:
    """Adds the options; None stands for what was not asked for."""
    group = sub.add_argument_group('of the method', "each is the method's own unless told")
    group.add_argument('--rank', type=count, help='of lora and dora: inner width')
    group.add_argument('--alpha', type=positive, help='likewise: scale is alpha / rank')
    group.add_argument('--dropout', type=part, help='likewise: part of their input dropped')
    group.add_argument('--reduction', type=positive, help='of adapters: outputs / inner width')
    group.add_argument('--virtual-tokens', type=count, help='of prompt and prefix: how many')
    group.add_argument(
        '--target', nargs='+', metavar='REGEX', help='searched in paths, as inspect prints them'
    )
    group.add_argument('--feedforward', metavar='REGEX', help='of ia3: scaled at the input')


def settle(options: argparse.Namespace, name: str, methods: Mapping[str, Kind]) -> Kind:
    """A method with the numbers that were asked for; fills in those that were not.

    Alpha follows the rank unless it was asked for, so that the scale of the product stays.

    Args:
      options: as parsed; changed.
      name: of the method.
      methods: all that there are, by name; None for one without numbers.

    Returns:
      The method.

    Raises:
      ValueError: an option that the method does not take, or a value that it refuses.
    """
    changes = _given(options, name, methods)
    method: Any = methods[name]
    if 'target' in changes:
        one, *more = changes['target']
        changes['target'] = (one, *more) if more else one
    if 'rank' in changes and method.alpha is not None:
        changes.setdefault('alpha', method.alpha * changes['rank'] / method.rank)
    if changes:
        method = dataclasses.replace(method, **changes)
    for option, field in FIELDS.items():
        setattr(options, option, getattr(method, field, None))
    return method


def _given(options: argparse.Namespace, name: str, methods: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that were asked for, each of which the method has."""
    found: dict[str, Any] = {}
    for option, field in FIELDS.items():
        value = getattr(options, option)
        if value is None:
            continue
        takers = [other for other, method in methods.items() if hasattr(method, field)]
        if name not in takers:
            raise not_for(option, name, takers)
        found[field] = value
    return found


def not_for(option: str, name: str, takers: Iterable[str]) -> ValueError:
    """The error for an option that a method does not take.

    Args:
      option: as parsed.
      name: of the method.
      takers: the methods that take it.
    """
    return ValueError(
        f'--{option.replace("_", "-")} is not for {name}; it is for {", ".join(takers)}. '
        'Leave it out, or choose another --method'
    )
