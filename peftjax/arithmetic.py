"""Sums of adapters: several plans with their phi become one plan with one phi.

An adapter is `(peft, phi)`, as `attach` and `init` give them, or what `pj.load` or
`pj.hf.load_adapter` found; all are of one model and of the same sites. The result is `(peft, phi)`:
it wraps, merges, is saved and exported as any other, and no model is needed to make it. Its plan is
that of the first adapter with the ranks of the result, and every scale is 1: the scales of all
(`alpha / rank`, rank-stabilized, with patterns, each adapter its own) go into the factors.

What adds up is the update of each method: the product of `Lora`; of `Trainable`, `BitFit`,
`NormTuning`, `TrainableTokens` what they change of theta, hence `params`; of `Ia3` the scales less
one. Anything else is refused. A weight of -1 takes an adapter back, which is negation (Ilharco et
al., Editing Models with Task Arithmetic, 2022, arXiv:2212.04089).
"""

from collections.abc import Sequence

from peftjax._joins import beside_each_other, factors, nearest, updates
from peftjax._method import typed_key
from peftjax._mixing import Mixing
from peftjax._summable import Adapter, Adapters
from peftjax._sums import combine
from peftjax._types import Array, PyTree

PLACES = ('factors', 'update')


def linear(
    adapters: Adapters, weights: Sequence[float], *, params: PyTree | None = None
) -> Adapter:
    """Sums `a` and `b` apart, each times the root of weight and scale.

    Cheap, of the same rank, and rough: the product of two sums is not the sum of two products.
    `cat` and `svd` are exact.

    Args:
      adapters: plans with their phi, of the same sites and ranks.
      weights: one for each; negative ones take back.
      params: theta, where leaves themselves are trained.

    Returns:
      A plan and its phi.

    Raises:
      ValueError: the adapters are not of one model, kind and rank, or are none that can be summed.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params, x = {'kernel': jnp.ones((3, 4))}, jnp.ones((2, 3))
      >>> model = lambda params, x: x @ params['kernel']
      >>> peft = pj.attach(pj.Lora(rank=2, alpha=4, target='kernel'), model, params, x)
      >>> phi = jax.tree.map(jnp.ones_like, peft.init(jax.random.key(0), params))
      >>> both, own = pj.arithmetic.linear([(peft, phi), (peft, phi)], [0.5, 0.25])
      >>> no, none = pj.arithmetic.linear([(peft, phi)], [-1])
      >>> [round(float(p.wrap(model)(params, q, x)[0, 0])) for p, q in ((peft, phi), (no, none))]
      [15, -9]
    """
    return combine(adapters, weights, Mixing(), factors(Mixing()), params=params)


def cat(adapters: Adapters, weights: Sequence[float], *, params: PyTree | None = None) -> Adapter:
    """Sums updates exactly: ranks add up.

    Args:
      adapters: plans with their phi, of the same sites; ranks may differ.
      weights: one for each; negative ones take back.
      params: theta, where leaves themselves are trained.

    Returns:
      A plan and its phi.

    Raises:
      ValueError: as `linear`, or the ranks add up to more than a weight has.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params, x = {'kernel': jnp.ones((3, 4))}, jnp.ones((2, 3))
      >>> model = lambda params, x: x @ params['kernel']
      >>> peft = pj.attach(pj.Lora(rank=1, target='kernel'), model, params, x)
      >>> phi = jax.tree.map(jnp.ones_like, peft.init(jax.random.key(0), params))
      >>> both, own = pj.arithmetic.cat([(peft, phi), (peft, phi)], [0.5, 0.25])
      >>> both.method.rank, float(both.wrap(model)(params, own, x)[0, 0])
      (2, 5.25)
    """
    return combine(adapters, weights, Mixing(), beside_each_other, params=params)


def svd(
    adapters: Adapters,
    weights: Sequence[float],
    *,
    rank: int | None = None,
    params: PyTree | None = None,
) -> Adapter:
    """Sums updates, and takes the nearest update of some rank.

    No weight is formed: the decomposition is that of the factors' own small core.

    Args:
      adapters: plans with their phi, of the same sites; ranks may differ.
      weights: one for each; negative ones take back.
      rank: of the result; else at each site the largest of the adapters.
      params: theta, where leaves themselves are trained.

    Returns:
      A plan and its phi: `a` orthonormal.

    Raises:
      ValueError: as `linear`, or `rank` is more than the sum of the ranks, or than a weight has.
      TypeError: `rank` is no integer.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params, x = {'kernel': jnp.ones((3, 4))}, jnp.ones((2, 3))
      >>> model = lambda params, x: x @ params['kernel']
      >>> peft = pj.attach(pj.Lora(rank=2, target='kernel'), model, params, x)
      >>> phi = jax.tree.map(jnp.ones_like, peft.init(jax.random.key(0), params))
      >>> small, own = pj.arithmetic.svd([(peft, phi)], [1.0], rank=1)
      >>> small.method.rank, round(float(small.wrap(model)(params, own, x)[0, 0]), 4)
      (1, 9.0)

    Reference: Eckart and Young, The approximation of one matrix by another of lower rank, 1936.
    """
    return combine(adapters, weights, Mixing(), nearest(rank), params=params)


def magnitude_prune(
    adapters: Adapters,
    weights: Sequence[float],
    *,
    density: float,
    on: str = 'factors',
    rank: int | None = None,
    params: PyTree | None = None,
) -> Adapter:
    """Keeps the largest entries of each adapter, and sums.

    Args:
      adapters: plans with their phi, of the same sites; for `factors` of the same ranks.
      weights: one for each; negative ones take back.
      density: the part of the entries that is kept, layer by layer; their number is rounded down,
        as in PEFT, and of few entries there may be none.
      on: `factors` prunes and sums `a` and `b` apart, as `linear`; `update` does so with the
        products, which are formed for this, and decomposes the sum.
      rank: of the decomposition; else at each site the largest of the adapters.
      params: theta, where leaves themselves are trained.

    Returns:
      A plan and its phi.

    Raises:
      ValueError: as `linear`; `density` is not in (0, 1], `on` is neither, `rank` is too large or
        given for `factors`.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params, x = {'kernel': jnp.ones((3, 4))}, jnp.ones((2, 3))
      >>> model = lambda params, x: x @ params['kernel']
      >>> peft = pj.attach(pj.Lora(rank=2, target='kernel'), model, params, x)
      >>> phi = peft.init(jax.random.key(0), params)
      >>> _, own = pj.arithmetic.magnitude_prune([(peft, phi)], [1.0], density=0.5)
      >>> int((own['kernel']['a'] != 0).sum())
      3
    """
    return _mixed(adapters, weights, Mixing('magnitude', density), on, rank, None, params)


def ties(
    adapters: Adapters,
    weights: Sequence[float],
    *,
    density: float,
    elect: str = 'total',
    on: str = 'factors',
    rank: int | None = None,
    params: PyTree | None = None,
) -> Adapter:
    """TIES: trims each adapter, elects a sign for each entry, averages those that have it.

    Args:
      adapters: plans with their phi, of the same sites; for `factors` of the same ranks.
      weights: one for each, which multiply after the election.
      density: the part of the entries that is kept, layer by layer; their number is rounded down,
        as in PEFT, and of few entries there may be none.
      elect: `total` takes the sign of the sum, `frequency` that of more adapters.
      on: `factors`, or `update` with a decomposition; see `magnitude_prune`.
      rank: of the decomposition; else at each site the largest of the adapters.
      params: theta, where leaves themselves are trained.

    Returns:
      A plan and its phi.

    Raises:
      ValueError: as `magnitude_prune`, or `elect` is neither.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params, x = {'bias': jnp.zeros(2)}, jnp.ones((3, 2))
      >>> model = lambda params, x: x + params['bias']
      >>> peft = pj.attach(pj.BitFit(target='bias'), model, params, x)
      >>> phis = [{'bias': {'value': jnp.array(v)}} for v in ([1.0, 2.0], [3.0, -1.0])]
      >>> adapters = [(peft, phi) for phi in phis]
      >>> _, own = pj.arithmetic.ties(adapters, [1.0, 1.0], density=1.0, params=params)
      >>> own['bias']['value'].tolist()
      [2.0, 2.0]

    Reference: Yadav et al., TIES-Merging: Resolving Interference When Merging Models, 2023,
    arXiv:2306.01708, algorithm 1.
    """
    mixing = Mixing('magnitude', density, elect)
    return _mixed(adapters, weights, mixing, on, rank, None, params)


def dare(
    adapters: Adapters,
    weights: Sequence[float],
    *,
    key: Array,
    density: float,
    elect: str | None = None,
    on: str = 'factors',
    rank: int | None = None,
    params: PyTree | None = None,
) -> Adapter:
    """DARE: drops entries of each adapter at random, scales up the others, and sums.

    Args:
      adapters: plans with their phi, of the same sites; for `factors` of the same ranks.
      weights: one for each.
      key: typed PRNG key; each path draws from a key of its own.
      density: the probability with which an entry is kept.
      elect: None sums; `total` and `frequency` elect signs as `ties` does.
      on: `factors`, or `update` with a decomposition; see `magnitude_prune`.
      rank: of the decomposition; else at each site the largest of the adapters.
      params: theta, where leaves themselves are trained.

    Returns:
      A plan and its phi.

    Raises:
      ValueError: as `ties`.
      TypeError: `key` is not one typed key.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params, x = {'bias': jnp.zeros(8)}, jnp.ones((3, 8))
      >>> model = lambda params, x: x + params['bias']
      >>> peft = pj.attach(pj.BitFit(target='bias'), model, params, x)
      >>> adapter = peft, {'bias': {'value': jnp.ones(8)}}
      >>> _, own = pj.arithmetic.dare(
      ...     [adapter], [1.0], key=jax.random.key(0), density=0.5, params=params)
      >>> sorted(set(own['bias']['value'].tolist()))
      [0.0, 2.0]

    Reference: Yu et al., Language Models are Super Mario: Absorbing Abilities from Homologous
    Models as a Free Lunch, 2023, arXiv:2311.03099, section 3.
    """
    mixing = Mixing('random', density, elect)
    return _mixed(adapters, weights, mixing, on, rank, typed_key(key), params)


def _mixed(
    adapters: Adapters,
    weights: Sequence[float],
    mixing: Mixing,
    on: str,
    rank: int | None,
    key: Array | None,
    params: PyTree | None,
) -> Adapter:
    """A sum of what is left of each adapter, of factors or of updates."""
    if on not in PLACES:
        raise ValueError(f'on must be one of {PLACES}; got {on!r}')
    if on == 'factors' and rank is not None:
        raise ValueError(
            f"factors are summed at the rank that they have; got rank={rank}. Use on='update'"
        )
    join = factors(mixing) if on == 'factors' else updates(mixing, rank)
    return combine(adapters, weights, mixing, join, key=key, params=params)
