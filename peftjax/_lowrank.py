"""The low-rank product `scale * a @ b`, which several methods share."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from peftjax import _paths
from peftjax._factor import Factor, lay
from peftjax._method import At, Rule, site_key, stacked_keys
from peftjax._sites import Site
from peftjax._standin import StandIn
from peftjax._types import Array, Path, Phi

Factors = dict[str, Array | Factor]
Spans = dict[str, frozenset[int]]


@dataclasses.dataclass(frozen=True)
class LowRank(Rule):
    """`x @ w + scale * (x @ a) @ b`."""

    scale: float
    dropout: float = 0.0

    def fits(self, at: At) -> bool:
        """The input meets one factor whole, the output the other."""
        return direction(at) is not None

    def post(self, at: At, x: Array, y: Array) -> Array:
        """Adds the low-rank path."""
        return y + self.path(at, x, y)

    def path(self, at: At, x: Array, y: Array) -> Array:
        """The low-rank path alone, in the dtype of the output."""
        first, last = direction(at) or ('a', 'b')
        if self.dropout and jnp.issubdtype(x.dtype, jnp.inexact):
            key = at.view.factors['key'].reshape(-1)[0]
            keep = 1 - self.dropout
            x = jnp.where(jax.random.bernoulli(key, keep, x.shape), x / keep, jnp.zeros_like(x))
        lookup = jnp.issubdtype(x.dtype, jnp.integer)
        h = at.down(x, first, y.dtype if lookup else None)
        if self.scale != 1:
            h = h * self.scale
        return at.up(h, last).astype(y.dtype)

    def dense(self, view: StandIn, w: Array) -> Array:
        """`w + scale * a @ b`."""
        return w + (self.scale * view.outer('a', 'b', w.dtype)).astype(w.dtype)


def direction(at: At) -> tuple[str, str] | None:
    """Which factor meets the input and which makes the output; a transposed use swaps them."""
    for first, last in (('a', 'b'), ('b', 'a')):
        if at.summed(first) and at.produced(last):
            return first, last
    return None


def scale_of(method: Any, site: Site) -> float:
    """The factor of the low-rank product at a site."""
    rank = rank_of(method, site)
    alpha = _pattern(method.alphas, site.path, rank if method.alpha is None else method.alpha)
    return alpha / (math.sqrt(rank) if method.rank_stabilized else rank)


def rank_of(method: Any, site: Site) -> int:
    """The rank at a site."""
    return _pattern(method.ranks, site.path, method.rank)


def _pattern(pairs: tuple[tuple[str, Any], ...], path: Path, default: Any) -> Any:
    return next((value for pattern, value in pairs if _paths.matches(pattern, path)), default)


def fresh_pair(method: Any, key: Array, site: Site) -> dict[str, Array]:
    """`a` and `b` of a site; their product is zero."""
    rank = rank_of(method, site)
    most = min(site.fan_in, site.fan_out)
    if rank > most:
        raise ValueError(
            f'{type(method).__name__}(rank={rank}) on {site.path!r} of shape {site.shape}: rank '
            f'must be at most {most}. Lower it, or set ranks=(({site.path!r}, {most}),)'
        )
    stack, key = site.sizes(site.stack), site_key(key, site.path)
    a = (*stack, *site.sizes(site.inputs), rank)
    b = (*stack, rank, *site.sizes(site.outputs))
    dtype = jnp.dtype(method.dtype)
    if site.kind == 'embedding':
        return {'a': jnp.zeros(a, dtype), 'b': jax.random.normal(key, b, dtype)}
    bound = 1 / math.sqrt(site.fan_in)
    return {'a': jax.random.uniform(key, a, dtype, -bound, bound), 'b': jnp.zeros(b, dtype)}


def pair_factors(site: Site, phi: Phi) -> tuple[Factors, Spans]:
    """`a` and `b` as they lie along the leaf, and the leaf axes that each depends on."""
    factors: Factors = {
        'a': lay(phi['a'], (*site.stack, *site.inputs, None), site.rank),
        'b': lay(phi['b'], (*site.stack, None, *site.outputs), site.rank),
    }
    spans = {
        'a': frozenset((*site.stack, *site.inputs)),
        'b': frozenset((*site.stack, *site.outputs)),
    }
    return factors, spans


def dropout_factor(
    probability: float, key: Array | None, site: Site, factors: Factors, spans: Spans
) -> float:
    """Adds the keys of dropout to the factors, if it is on; returns its probability."""
    if key is None or not probability:
        return 0.0
    factors['key'] = lay(stacked_keys(key, site), site.stack, site.rank)
    spans['key'] = frozenset(site.stack)
    return probability


def check_low_rank(method: Any) -> None:
    """Refuses fields out of range."""
    name = type(method).__name__
    every = (('rank', method.rank), *((f'ranks[{p!r}]', r) for p, r in method.ranks))
    for field, rank in every:
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f'{name}: {field} must be a positive integer; got {rank!r}')
    alphas = (('alpha', method.alpha), *((f'alphas[{p!r}]', a) for p, a in method.alphas))
    for field, alpha in alphas:
        if alpha is not None and not alpha > 0:
            raise ValueError(f'{name}: {field} must be positive; got {alpha!r}')
    if not 0 <= method.dropout < 1:
        raise ValueError(f'{name}: dropout must be in [0, 1); got {method.dropout!r}')
