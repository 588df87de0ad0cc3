"""The low-rank product `scale * a @ b`, which several methods share."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax

from peftjax import _paths
from peftjax._factor import Factor, along, lay
from peftjax._fields import number, positive, settle
from peftjax._method import At, Method, Rule, site_key, stacked_keys
from peftjax._sites import Site
from peftjax._standin import StandIn
from peftjax._types import Array, Path, Phi

Factors = dict[str, Factor]
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
        return lax.add(y, self.path(at, x, y))

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
            h = lax.mul(h, h.dtype.type(self.scale))
        return lax.convert_element_type(at.up(h, last), y.dtype)

    def dense(self, view: StandIn, w: Array) -> Array:
        """`w + scale * a @ b`."""
        return w + (self.scale * view.outer('a', 'b', w.dtype)).astype(w.dtype)


def direction(at: At) -> tuple[str, str] | None:
    """Which factor meets the input and which makes the output; a transposed use swaps them."""
    for first, last in (('a', 'b'), ('b', 'a')):
        if at.summed(first) and at.produced(last):
            return first, last
    return None


def pair_axes(site: Site) -> dict[str, tuple[int | None, ...]]:
    """The leaf axes along which `a` and `b` go."""
    return {'a': (*site.stack, *site.inputs, None), 'b': (*site.stack, None, *site.outputs)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankMethod(Method):
    """A method with a pair `a`, `b` at each weight; a method of this kind adds what it does more.

    Attributes:
      rank: inner width of the product.
      alpha: the product is scaled by `alpha / rank`; `None` stands for `rank`, hence 1.
      rank_stabilized: scale by `alpha / sqrt(rank)` instead.
      dropout: probability with which the input of the low-rank path is dropped.
      ranks: other ranks for some paths, `((pattern, rank), …)` or a dict; the first that
        matches counts.
      alphas: other alphas for some paths, likewise.
      dtype: of phi.
    """

    rank: int = 8
    alpha: float | None = None
    rank_stabilized: bool = False
    dropout: float = 0.0
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()
    dtype: str = 'float32'

    kinds: ClassVar[tuple[str, ...]] = ('linear', 'expert', 'embedding', 'convolution', 'other')
    seam: ClassVar[str] = 'weight'
    mergeable: ClassVar[bool] = True
    patterned: ClassVar[tuple[str, ...]] = ('ranks', 'alphas')

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        every = (('rank', self.rank), *((f'ranks[{p!r}]', r) for p, r in self.ranks))
        for field, rank in every:
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f'{name}: {field} must be a positive integer; got {rank!r}')
        alphas = tuple((p, positive(name, f'alphas[{p!r}]', a)) for p, a in self.alphas)
        alpha = None if self.alpha is None else positive(name, 'alpha', self.alpha)
        dropout = number(name, 'dropout', self.dropout)
        settle(self, alpha=alpha, alphas=alphas, dropout=dropout)
        if not 0 <= self.dropout < 1:
            raise ValueError(f'{name}: dropout must be in [0, 1); got {self.dropout!r}')

    def rank_at(self, site: Site) -> int:
        """The rank at a site."""
        return _pattern(self.ranks, site.path, self.rank)

    def scale_at(self, site: Site) -> float:
        """The factor of the product at a site."""
        rank = self.rank_at(site)
        alpha = _pattern(self.alphas, site.path, rank if self.alpha is None else self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def of_ranks(self, ranks: Mapping[Path, int]) -> Self:
        """The same with other ranks, and with scale 1 everywhere.

        Args:
          ranks: of each path.
        """
        usual = Counter(ranks.values()).most_common(1)[0][0]
        others = tuple((f'^{re.escape(path)}$', n) for path, n in ranks.items() if n != usual)
        return dataclasses.replace(
            self, rank=usual, ranks=others, alpha=None, alphas=(), rank_stabilized=False
        )

    def pair(self, key: Array, site: Site) -> dict[str, Array]:
        """`a` and `b` of a site; their product is zero."""
        rank = self.rank_at(site)
        most = min(site.fan_in, site.fan_out)
        if rank > most:
            raise ValueError(
                f'{type(self).__name__}(rank={rank}) on {site.path!r} of shape {site.shape}: rank '
                f'must be at most {most}. Lower it, or set ranks=(({site.path!r}, {most}),)'
            )
        stack, key = site.sizes(site.stack), site_key(key, site.path)
        a = (*stack, *site.sizes(site.inputs), rank)
        b = (*stack, rank, *site.sizes(site.outputs))
        dtype = jnp.dtype(self.dtype)
        if site.kind == 'embedding':
            return {'a': jnp.zeros(a, dtype), 'b': jax.random.normal(key, b, dtype)}
        bound = 1 / math.sqrt(site.fan_in)
        return {'a': jax.random.uniform(key, a, dtype, -bound, bound), 'b': jnp.zeros(b, dtype)}

    def axes(self, site: Site) -> Mapping[str, tuple[int | None, ...]]:
        """See `Method`."""
        return pair_axes(site)

    def low_rank(self, site: Site, phi: Phi, key: Array | None) -> tuple[Factors, Spans, 'LowRank']:
        """The pair along the leaf, the axes that each depends on, and the rule of the product."""
        factors, spans = along({name: phi[name] for name in 'ab'}, pair_axes(site), site.rank)
        dropout = 0.0
        if key is not None and self.dropout:
            dropout = self.dropout
            factors['key'] = lay(stacked_keys(key, site), site.stack, site.rank)
            spans['key'] = frozenset(site.stack)
        return factors, spans, LowRank(self.scale_at(site), dropout)


def _pattern(pairs: tuple[tuple[str, Any], ...], path: Path, default: Any) -> Any:
    return next((value for pattern, value in pairs if _paths.matches(pattern, path)), default)
