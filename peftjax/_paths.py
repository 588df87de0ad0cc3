"""Naming, selecting and replacing the leaves of a pytree."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from peftjax._quantized import is_quantized
from peftjax._types import Path, PyTree, Target


def name(keys: tuple[Any, ...]) -> Path:
    """The path of a leaf as text: its keys joined by `/`.

    The last key of an nnx leaf is the attribute `value` of its variable; it is dropped, so that
    nnx and linen read alike.
    """
    if keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == 'value':
        keys = keys[:-1]
    return jax.tree_util.keystr(keys, simple=True, separator='/')


def leaves(tree: PyTree) -> dict[Path, Any]:
    """All leaves by path, in the order of `jax.tree.leaves`; a quantized leaf counts as one.

    Raises:
      ValueError: two leaves share one path.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantized)
    named = [(name(keys), leaf) for keys, leaf in flat]
    found = dict(named)
    if len(found) < len(named):
        twice = next(path for path, _ in named if sum(path == other for other, _ in named) > 1)
        raise ValueError(f'each parameter needs a path of its own; {twice!r} names two leaves')
    return found


def replace(tree: PyTree, new: Mapping[Path, Any]) -> PyTree:
    """The same tree with the leaves at the paths of `new` replaced."""
    changed = lambda keys, leaf: new.get(name(keys), leaf)
    return jax.tree_util.tree_map_with_path(changed, tree, is_leaf=is_quantized)


def structure(tree: PyTree) -> Any:
    """The structure of a tree whose leaves are those of `leaves`."""
    return jax.tree.structure(tree, is_leaf=is_quantized)


def parent(path: Path) -> Path:
    """The path of the module that owns a leaf: `mlp/up` of `mlp/up/kernel`."""
    return path.rpartition('/')[0]


def patterns(target: Target) -> tuple[str, ...]:
    """The regular expressions of a target, checked.

    Raises:
      TypeError: the target is neither a string nor a tuple of strings.
      ValueError: an expression is empty or does not compile.
    """
    several = (target,) if isinstance(target, str) else target
    if not isinstance(several, tuple) or not all(isinstance(one, str) for one in several):
        raise TypeError(f'target must be a regular expression or a tuple of them; got {target!r}')
    if not several or not all(several):
        raise ValueError(f'target must not be empty; got {target!r}')
    for one in several:
        try:
            re.compile(one)
        except re.error as error:
            raise ValueError(f'target {one!r} is not a regular expression: {error}') from error
    return several


def matches(pattern: str, path: Path) -> bool:
    """Whether a pattern finds a path; a named value is found only by a pattern that begins `@`."""
    if path.startswith('@') or pattern.startswith('@'):
        both = path.startswith('@') and pattern.startswith('@')
        return both and re.fullmatch(rf'({pattern[1:]})(/\d+)?', path[1:]) is not None
    return re.search(pattern, path) is not None


def selected(target: Target, paths: Iterable[Path]) -> list[Path]:
    """The paths that a target finds, in the order of its patterns.

    Raises:
      ValueError: a pattern finds nothing.
    """
    every = list(paths)
    found: dict[Path, None] = {}
    for pattern in patterns(target):
        mine = [path for path in every if matches(pattern, path)]
        if not mine:
            close = ', '.join(map(repr, nearest(pattern, every)))
            raise ValueError(
                f'no leaf matches target={pattern!r}. Nearest: {close} ({len(every)} leaves)'
            )
        found.update(dict.fromkeys(mine))
    return list(found)


def nearest(pattern: str, paths: Iterable[Path], count: int = 5) -> list[Path]:
    """The paths that read most like a pattern, for error messages."""

    def likeness(path: Path) -> float:
        parts = [path, *path.split('/')]
        return max(difflib.SequenceMatcher(None, pattern, part).ratio() for part in parts)

    return sorted(dict.fromkeys(paths), key=likeness, reverse=True)[:count]
