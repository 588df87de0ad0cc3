"""Shapes of trees by path, and what is wrong where two of them differ."""

from collections.abc import Mapping
from typing import Any

from peftjax import _paths
from peftjax._types import Path, PyTree

Shape = tuple[Path, tuple[int, ...], str]
"""Path, shape and dtype of an array."""


def shapes_of(tree: PyTree) -> tuple[Shape, ...]:
    """Path, shape and dtype of each leaf.

    Raises:
      TypeError: a leaf is not an array.
    """
    leaves = _paths.leaves(tree).items()
    for path, leaf in leaves:
        if not hasattr(leaf, 'shape') or not hasattr(leaf, 'dtype'):
            raise TypeError(
                f'params and phi must hold arrays only; {path!r} is {leaf!r}. Make an array of it, '
                'or keep it out of the tree'
            )
    return tuple((path, tuple(leaf.shape), str(leaf.dtype)) for path, leaf in leaves)


def differences(want: Mapping[Path, Any], have: Mapping[Path, Any], what: str = '') -> str:
    """What is missing, unknown or different, the first ten; empty where nothing is."""
    wrong = [f'{path!r} is missing' for path in want if path not in have]
    wrong += [f'{path!r} is unknown' for path in have if path not in want]
    wrong += [
        f'{path!r} has {what}{have[path]}, not {want[path]}'
        for path in want
        if path in have and have[path] != want[path]
    ]
    more = f' and {len(wrong) - 10} more' if len(wrong) > 10 else ''
    return '; '.join(wrong[:10]) + more
