"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al. 2024, arXiv:2402.09353)."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from peftjax._factor import lay
from peftjax._lowrank import LowRank, LowRankMethod
from peftjax._method import At, Rule, float32
from peftjax._sites import Site, Sites, trainable
from peftjax._standin import StandIn
from peftjax._types import Array, Path, Phi


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dora(LowRankMethod):
    """Splits a weight into magnitude and direction: `m * v / norm(v)`, `v = w + scale * a @ b`.

    The norm is taken over the inputs of each output and counts as a constant for gradients
    (section 4.3 of the paper). It is computed from `w`, `a` and `b` without forming `v`.

    Attributes:
      target: regex, or several, searched in paths.
      rank: inner width of the product.
      alpha: the product is scaled by `alpha / rank`; `None` stands for `rank`.
      rank_stabilized: scale by `alpha / sqrt(rank)` instead.
      dropout: probability with which the input of the low-rank path is dropped, where the
        forward is given a `dropout_key`.
      ranks: other ranks for some paths, `((pattern, rank), …)` or a dict.
      alphas: other alphas for some paths, likewise.
      dtype: of phi.

    Shapes: `a: (*stack, *in, rank)`, `b: (*stack, rank, *out)`, `m: (*stack, *out)`. At init
    `m = norm(w)` and `b = 0`: the model equals the base up to rounding of the norm.

    Raises:
      ValueError: as `Lora`.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params = {'up': {'kernel': jnp.ones((3, 4))}}
      >>> peft = pj.attach(
      ...     pj.Dora(rank=2, target='kernel'),
      ...     lambda p, x: x @ p['up']['kernel'], params, jnp.ones((5, 3)))
      >>> jax.tree.map(jnp.shape, peft.init(jax.random.key(0), params))
      {'up/kernel': {'a': (3, 2), 'b': (2, 4), 'm': (4,)}}

    Reference: Liu et al. 2024, equation 5.
    """

    identity: ClassVar[str] = 'rounding'

    def select(self, sites: Sites) -> tuple[Site, ...]:
        """See `Method`; the norm is that of real weights with fractions."""
        chosen = super().select(sites)
        for site in chosen:
            if not trainable(site.dtype) or 'complex' in site.dtype:
                raise ValueError(
                    f'Dora takes norms of real floating weights; {site.path!r} is {site.dtype}. '
                    'Convert the leaf first, or leave it out of the target'
                )
        return chosen

    def init(self, key: Array, sites: tuple[Site, ...], params: Mapping[Path, Any]) -> Phi:
        """See `Method`; the magnitudes are read from the weights."""
        phi = {}
        for site in sites:
            pair = self.pair(key, site)
            norm = jnp.sqrt(_square(params[site.path], _letters(site))).astype(self.dtype)
            phi[site.path] = {**pair, 'm': norm}
        return phi

    def axes(self, site: Site) -> Mapping[str, tuple[int | None, ...]]:
        """See `Method`."""
        return {**super().axes(site), 'm': (*site.stack, *site.outputs)}

    def bind(self, site: Site, w: Any, phi: Phi, key: Array | None) -> StandIn:
        """See `Method`."""
        factors, spans, product = self.low_rank(site, phi, key)
        norm = _norm_below(w, phi, site, product.scale)
        made = (*site.stack, *site.outputs)
        factors['gain'] = lay(float32(phi['m']) / norm, made, site.rank)
        spans['gain'] = frozenset(made)
        return StandIn.over(site, w, factors, spans, Decomposed(product))


@dataclasses.dataclass(frozen=True)
class Decomposed(Rule):
    """`gain * (x @ w + scale * (x @ a) @ b)`."""

    direction: LowRank

    def fits(self, at: At) -> bool:
        """As the low-rank product; the gain lies along the output, or an input to scale."""
        index = at.use.kind == 'embedding'
        return self.direction.fits(at) and (at.produced('gain') or not index)

    def pre(self, at: At, x: Array) -> Array:
        """In a transposed use (a tied head) the gain lies along the input."""
        if at.produced('gain'):
            return x
        return x * at.on_input(x, 'gain')

    def post(self, at: At, x: Array, y: Array) -> Array:
        """Adds the low-rank path and applies the gain."""
        if not at.produced('gain'):
            return self.direction.post(at, self.pre(at, x), y)
        y = self.direction.post(at, x, y)
        return y * at.on_output(y, 'gain')

    def dense(self, view: StandIn, w: Array) -> Array:
        """`gain * (w + scale * a @ b)`."""
        return view.factors['gain'].astype(w.dtype) * self.direction.dense(view, w)


def _letters(site: Site) -> tuple[str, str, str, str]:
    names = 'abcdefghijklmnopq'[: site.rank]
    pick = lambda axes: ''.join(names[axis] for axis in axes)
    return names, pick(site.stack), pick(site.inputs), pick(site.outputs)


def _square(w: Array, letters: tuple[str, ...]) -> Array:
    """Squared norm of each output's weights: `(*stack, *out)`, in float32."""
    names, stack, _, out = letters
    return _sum(f'{names},{names}->{stack}{out}', w, w)


def _norm_below(w: Any, phi: Phi, site: Site, scale: float) -> Array:
    """The norm over a weight, or over what a method below makes: that one layer at a time."""
    w, pair = jax.lax.stop_gradient((w, {name: phi[name] for name in 'ab'}))
    if isinstance(w, StandIn) and 0 in site.stack and isinstance(led := w.lead(), StandIn):
        one = _layer(site)
        each = lambda layer: _norm_below(layer[0].body(), layer[1], one, scale)
        return jax.lax.map(each, (led, pair))
    w = w.dense() if isinstance(w, StandIn) else w
    return _norm(w, pair['a'], pair['b'], _letters(site), scale)


@partial(jax.jit, static_argnums=(3, 4), inline=True)
def _norm(w: Array, a: Array, b: Array, letters: tuple[str, ...], scale: float) -> Array:
    """Norm of `w + scale * a @ b` over the inputs, from products of the size of the factors.

    Of an output without weights, whose magnitude is zero too, it counts as one. Traced once for
    all weights of one shape.
    """
    names, stack, ins, out = letters
    a, b = float32(a), float32(b)
    both = f'{stack}{out}'
    wa = _sum(f'{names},{stack}{ins}r->{stack}r{out}', w, a.astype(w.dtype))
    aa = _sum(f'{stack}{ins}r,{stack}{ins}s->{stack}rs', a, a)
    cross = _sum(f'{stack}r{out},{stack}r{out}->{both}', wa, b)
    inner = _sum(f'{stack}rs,{stack}s{out}->{stack}r{out}', aa, b)
    low = _sum(f'{stack}r{out},{stack}r{out}->{both}', inner, b)
    square = _square(w, letters) + 2 * scale * cross + scale**2 * low
    return jnp.sqrt(jnp.where(square > 0, square, 1))


def _layer(site: Site) -> Site:
    """One layer of a site whose first axis is that of layers."""
    later = lambda axes: tuple(axis - 1 for axis in axes if axis)
    axes = {name: later(getattr(site, name)) for name in ('stack', 'inputs', 'outputs')}
    return dataclasses.replace(site, shape=site.shape[1:], **axes)


def _sum(spec: str, *terms: Array) -> Array:
    # on explicit axes a product over axes that are split must be told where its result lies
    where: dict[str, Any] = {}
    ins, out = spec.split('->')
    for letters, term in zip(ins.split(','), terms, strict=True):
        where |= {
            letter: entry
            for letter, entry in zip(letters, jax.typeof(term).sharding.spec, strict=True)
            if entry is not None
        }
    told: dict[str, Any] = {'out_sharding': PartitionSpec(*map(where.get, out))} if where else {}
    return jnp.einsum(spec, *terms, preferred_element_type=jnp.float32, **told)
