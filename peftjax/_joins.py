"""Low-rank products that become one: by their factors, by their sum, beside each other."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from peftjax._counts import whole
from peftjax._mixing import Mixing, split, truncated
from peftjax._types import Array, Path

Factors: TypeAlias = tuple[Array, Array]


@dataclasses.dataclass(frozen=True)
class Pair:
    """The factors of one adapter at one site, its stacked layers in one axis.

    Attributes:
      a: `(layers, in, rank)`.
      b: `(layers, rank, out)`.
      scale: of their product.
    """

    a: Array
    b: Array
    scale: float


Join = Callable[[Path, Sequence[Pair], Array, Array | None], Factors]
"""How pairs become one pair, of scale 1: by path, pairs, weights and key."""


def factors(mixing: Mixing) -> Join:
    """Mixes `a` and `b` apart."""

    def join(path: Path, pairs: Sequence[Pair], weights: Array, key: Array | None) -> Factors:
        ranks = [pair.a.shape[2] for pair in pairs]
        if len(set(ranks)) > 1:
            raise ValueError(
                f'factors of one rank can be summed; at {path!r} the ranks are {ranks}. Use cat, '
                "svd, or on='update'"
            )
        whole = weights * jnp.array([pair.scale for pair in pairs], weights.dtype)
        root = jnp.sqrt(jnp.abs(whole))
        keys = (None, None) if key is None else jax.random.split(key)
        # the sign goes to one side alone, else it would vanish in the product
        a = mixing([pair.a for pair in pairs], jnp.where(whole < 0, -root, root), keys[0])
        return a, mixing([pair.b for pair in pairs], root, keys[1])

    return join


def updates(mixing: Mixing, rank: int | None) -> Join:
    """Mixes products, and decomposes the sum."""

    def join(path: Path, pairs: Sequence[Pair], weights: Array, key: Array | None) -> Factors:
        products = [pair.scale * pair.a @ pair.b for pair in pairs]
        update = mixing(products, weights, key)
        return split(update, _rank(path, rank, pairs, min(update.shape[1:])))

    return join


def beside_each_other(path: Path, pairs: Sequence[Pair], weights: Array, key: Any) -> Factors:
    """Their columns and rows in a row: the exact sum."""
    del key
    a, b = _concatenated(pairs, weights)
    most = min(a.shape[1], b.shape[2])
    if a.shape[2] > most:
        raise ValueError(
            f'a product of {most} and more ranks is any matrix; at {path!r} the ranks add up to '
            f'{a.shape[2]}. Use svd, exact from rank {most} on'
        )
    return a, b


def nearest(rank: int | None) -> Join:
    """The nearest product of some rank to the sum, which is not formed."""

    def join(path: Path, pairs: Sequence[Pair], weights: Array, key: Any) -> Factors:
        del key
        a, b = _concatenated(pairs, weights)
        return truncated(a, b, _rank(path, rank, pairs, min(*a.shape[1:], b.shape[2])))

    return join


def _concatenated(pairs: Sequence[Pair], weights: Array) -> Factors:
    """One pair whose product is the sum of all."""
    a = [pair.a * (weight * pair.scale) for pair, weight in zip(pairs, weights, strict=True)]
    return jnp.concatenate(a, axis=2), jnp.concatenate([pair.b for pair in pairs], axis=1)


def _rank(path: Path, rank: int | None, pairs: Sequence[Pair], most: int) -> int:
    if rank is None:
        return min(most, max(pair.a.shape[2] for pair in pairs))
    rank = whole('rank', rank)
    if rank > most:
        raise ValueError(f'at {path!r} rank must be from 1 to {most}; got {rank}')
    return rank
