"""Naming, selecting and replacing the leaves of a pytree."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax

from peftjax._quantized import is_quantized
from peftjax._types import Path, PyTree, Target


def leaves(tree: PyTree) -> dict[Path, Any]:
    """All leaves by path, in the order of `jax.tree.leaves`; a quantized leaf counts as one.

    Raises:
      ValueError: two leaves share one path.
    """
    named, _ = _named(tree)
    found = dict(named)
    if len(found) < len(named):
        twice = next(path for path, _ in named if sum(path == other for other, _ in named) > 1)
        raise ValueError(f'each parameter needs a path of its own; {twice!r} names two leaves')
    return found


def mapped(change: Callable[[Path, Any], Any], tree: PyTree) -> PyTree:
    """The same tree of what a function makes of each path and leaf."""
    named, shape = _named(tree)
    return jax.tree.unflatten(shape, [change(path, leaf) for path, leaf in named])


def replace(tree: PyTree, new: Mapping[Path, Any]) -> PyTree:
    """The same tree with the leaves at the paths of `new` replaced."""
    return mapped(new.get, tree)


def _named(tree: PyTree) -> tuple[list[tuple[Path, Any]], Any]:
    """The leaves with their paths, and the structure: the keys of a leaf are joined by `/`.

    What boxes one leaf as its `value`, such as a variable of nnx or a partitioned array of linen,
    adds nothing to the path, so that all frameworks read alike. A `value` that has others beside
    it, as in `(query, key, value)`, is a name like any other.
    """
    flat, shape = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantized)
    values = any(_ends_in_value(keys) for keys, _ in flat)
    alone = list(_alone(shape)) if values else [False] * len(flat)
    named = [
        (_joined(keys[:-1] if only and _ends_in_value(keys) else keys), leaf)
        for (keys, leaf), only in zip(flat, alone, strict=True)
    ]
    return named, shape


def _joined(keys: tuple[Any, ...]) -> Path:
    return jax.tree_util.keystr(keys, simple=True, separator='/')


def _ends_in_value(keys: tuple[Any, ...]) -> bool:
    """Whether the last of several keys is the attribute `value`; a path needs one key at least."""
    value = jax.tree_util.GetAttrKey('value')
    return len(keys) > 1 and keys[-1] == value


def _alone(shape: Any) -> Iterator[bool]:
    """For each leaf, whether it is all that its node holds: `None` beside it counts as held."""
    children = shape.children()
    for child in children:
        if child.num_nodes == child.num_leaves == 1:
            yield len(children) == 1
        else:
            yield from _alone(child)


def structure(tree: PyTree) -> Any:
    """The structure of a tree whose leaves are those of `leaves`."""
    return jax.tree.structure(tree, is_leaf=is_quantized)


def parent(path: Path) -> Path:
    """The path of the module that owns a leaf: `mlp/up` of `mlp/up/kernel`."""
    return path.rpartition('/')[0]


def patterns(target: Target) -> tuple[str, ...]:
    """The regular expressions of a target, checked.

    Raises:
      TypeError: the target is neither a string nor a tuple or list of strings.
      ValueError: an expression is empty or does not compile.
    """
    several = (target,) if isinstance(target, str) else target
    if not isinstance(several, tuple | list) or not all(isinstance(one, str) for one in several):
        raise TypeError(f'target must be a regular expression or several of them; got {target!r}')
    if not several or not all(several):
        raise ValueError(f'target must not be empty; got {target!r}')
    for one in several:
        try:
            re.compile(one)
        except re.error as error:
            raise ValueError(f'target {one!r} is not a regular expression: {error}') from error
    return tuple(several)


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
