"""How layout operations move the axes of a weight, and of what is attached to it.

Between the leaf and its use a weight may be transposed, reshaped, sliced. Each current dimension
is *labeled* with the set of leaf axes that it is made of. A factor (LoRA's `a`, DoRA's scale) is
kept in *broadcast form*: it has all current dimensions of the weight, of size one where it does
not depend on them, then its own extra dimensions (the rank). So the same operation, with the
sizes adapted, moves the factor along.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from peftjax._factor import Factor
from peftjax._types import Array

Labels = tuple[frozenset[int], ...]
Full = tuple[bool, ...]
NONE: frozenset[int] = frozenset()


class Layout(NamedTuple):
    """One layout operation, as seen by labels and by factors."""

    dims: Labels
    """Labels of the result's dimensions."""
    move: Callable[[Factor, Full], Factor | None]
    """Applies the operation to a factor, given which of its dimensions have full size.
    `None` where the result has no broadcast form."""


def _formed(dims: Labels, move: Callable[[Array, Full], Array | None]) -> Layout:
    """An operation that is done to the broadcast form of a factor."""

    def on(f: Factor, full: Full) -> Factor | None:
        moved = move(f.form(), full)
        return None if moved is None else Factor.formed(moved)

    return Layout(dims, on)


def same(dims: Labels) -> Layout:
    """An operation that leaves the dimensions alone (a cast, a copy)."""
    return Layout(dims, lambda f, full: f)


def reshard(dims: Labels, spec: Sequence[Any]) -> Layout:
    """Dimensions laid out on the mesh in another way, or on a mesh with axes of another type."""
    axes = (*spec, *(None,) * (len(dims) - len(spec)))

    def move(f: Factor, full: Full) -> Factor:
        mine = {f.order[d]: axes[d] for d in range(len(dims)) if full[d]}
        spec = jax.sharding.PartitionSpec(*(mine.get(d) for d in range(f.array.ndim)))
        return Factor(jax.sharding.reshard(f.array, spec), f.order)

    return Layout(dims, move)


def transpose(dims: Labels, permutation: Sequence[int]) -> Layout:
    """Dimensions in another order."""

    def move(f: Factor, full: Full) -> Factor:
        return Factor(f.array, (*(f.order[d] for d in permutation), *f.order[len(dims) :]))

    return Layout(tuple(dims[d] for d in permutation), move)


def squeeze(dims: Labels, drop: Sequence[int]) -> Layout:
    """Dimensions of size one removed; the axes they came from count as indexed."""
    gone = {d % len(dims) for d in drop}

    def move(f: Array, full: Full) -> Array:
        return jnp.squeeze(f, tuple(sorted(gone)))

    return _formed(tuple(label for d, label in enumerate(dims) if d not in gone), move)


def window(
    dims: Labels, start: Sequence[int], limit: Sequence[int], strides: Sequence[int] | None
) -> Layout:
    """A static slice."""
    steps = tuple(strides or (1,) * len(dims))

    def move(f: Array, full: Full) -> Array:
        index = [
            slice(a, b, s) if whole else slice(None)
            for a, b, s, whole in zip(start, limit, steps, full, strict=True)
        ]
        return f[tuple(index)]

    return _formed(dims, move)


def dynamic_window(dims: Labels, start: Sequence[Array], sizes: Sequence[int]) -> Layout:
    """A slice whose start is known at run time only."""

    def move(f: Array, full: Full) -> Array:
        extra = f.ndim - len(dims)
        begin = [s if whole else jnp.zeros_like(s) for s, whole in zip(start, full, strict=True)]
        begin += [jnp.zeros_like(begin[0])] * extra if begin else [0] * extra
        length = [n if whole else 1 for n, whole in zip(sizes, full, strict=True)]
        return lax.dynamic_slice(f, begin, (*length, *f.shape[len(dims) :]))

    return _formed(dims, move)


def expand(dims: Labels, shape: Sequence[int], new: Sequence[int], at: Sequence[int]) -> Layout:
    """`broadcast_in_dim`: dimension `d` of `shape` lands at `at[d]` of `new`.

    Dimensions that are truly repeated carry no label, and factors stay of size one there.
    """
    labels = [NONE] * len(new)
    for d, place in enumerate(at):
        labels[place] = dims[d] if shape[d] == new[place] else NONE

    def move(f: Array, full: Full) -> Array:
        sizes = [1] * len(new)
        for d, place in enumerate(at):
            sizes[place] = f.shape[d]
        return jnp.reshape(f, (*sizes, *f.shape[len(dims) :]))

    return _formed(tuple(labels), move)


def reshape(dims: Labels, shape: Sequence[int], new: Sequence[int]) -> Layout | None:
    """Dimensions split or merged, in row-major order."""
    groups = _groups(shape, new)
    if groups is None:
        return None
    labels = [NONE] * len(new)
    for old, made in groups:
        union = frozenset().union(*(dims[d] for d in old))
        for d in made:
            labels[d] = union if new[d] > 1 else NONE

    def move(f: Array, full: Full) -> Array | None:
        sizes = [1] * len(new)
        for old, made in groups:
            kept = {full[d] for d in old if shape[d] > 1}
            if kept == {True, False}:
                return None
            for d in made:
                sizes[d] = new[d] if kept == {True} else 1
        return jnp.reshape(f, (*sizes, *f.shape[len(dims) :]))

    return _formed(tuple(labels), move)


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """Pairs the dimensions of two shapes that hold the same elements in row-major order."""
    if math.prod(old) == 0:
        return None
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        if i < len(old) and old[i] == 1:
            groups.append(([i], []))
            i += 1
            continue
        if j < len(new) and new[j] == 1:
            groups.append(([], [j]))
            j += 1
            continue
        left, right, a, b = [i], [j], old[i], new[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                left.append(i)
                a, i = a * old[i], i + 1
            else:
                right.append(j)
                b, j = b * new[j], j + 1
        groups.append((left, right))
    return groups
