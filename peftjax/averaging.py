"""The moving average of phi, kept where the optimizer keeps its own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from peftjax._one_pass import wide
from peftjax._types import Array, Phi, PyTree


class MovingAverage(NamedTuple):
    """The state of `moving_average`.

    Attributes:
      inner: of the optimizer.
      phi: the average; float32 where phi is narrower.
      weight: float32, the sum of the weights of all that was averaged, 1 in the end.
    """

    inner: optax.OptState
    phi: Phi
    weight: Array


def moving_average(
    tx: optax.GradientTransformation, *, decay: float
) -> optax.GradientTransformation:
    """Keeps the exponential moving average of phi beside an optimizer, which it leaves as it is.

    After n updates the average is the mean of the n phi with the weights `decay**(n - i)`, so that
    the phi of the start has no part in it. It lies in the optimizer's state: it is saved, restored,
    sharded and donated with it, and an update that is not made does not count. `optax.ema` averages
    updates instead. Of a product such as that of LoRA the factors are averaged, each by itself.

    Args:
      tx: the whole optimizer: what stands behind it would not be seen.
      decay: the weight of the past, at least 0 and below 1. The average is over about
        `1 / (1 - decay)` updates.

    Returns:
      An optimizer; `averaged` reads the average out of its state.

    Raises:
      ValueError: `decay` is not at least 0 and below 1, or (from `update`) phi was not given.

    Example:
      >>> import jax.numpy as jnp, optax, peftjax as pj
      >>> phi = {'w': {'a': jnp.zeros(1)}}
      >>> tx = pj.moving_average(optax.sgd(1.0), decay=0.5)
      >>> state = tx.init(phi)
      >>> for _ in range(2):
      ...     updates, state = tx.update({'w': {'a': jnp.full(1, -3.0)}}, state, phi)
      ...     phi = optax.apply_updates(phi, updates)
      >>> phi['w']['a'].tolist(), pj.averaged(state)['w']['a'].tolist()  # (1 * 3 + 2 * 6) / 3
      ([6.0], [5.0])

    Reference: Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992;
    the correction at the start is that of Kingma and Ba, Adam, 2014, arXiv:1412.6980, section 3.
    """
    if not 0 <= decay < 1:
        raise ValueError(f'decay must be at least 0 and below 1: received {decay}')
    inner = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> MovingAverage:
        # copies, since phi and this state are donated together
        start = jax.tree.map(lambda x: jnp.array(x, wide(x.dtype)), params)
        return MovingAverage(inner.init(params), start, jnp.zeros((), jnp.float32))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, MovingAverage]:
        if params is None:
            raise ValueError('an average is one of phi: pass it, as update(grads, state, phi)')
        updates, own = inner.update(updates, state.inner, params, **extra)
        weight = decay * state.weight + (1 - decay)
        # the average of the first update is its phi, exactly
        part = jnp.where(state.weight == 0, 1, (1 - decay) / weight)
        move = lambda old, new: old + part.astype(old.dtype) * (new.astype(old.dtype) - old)
        phi = jax.tree.map(move, state.phi, optax.apply_updates(params, updates))
        return updates, MovingAverage(own, phi, weight)

    return optax.GradientTransformationExtraArgs(init, update)


def averaged(state: PyTree) -> Phi:
    """The average that `moving_average` keeps.

    Args:
      state: a `TrainState`, or the state of an optimizer in which there is one average.

    Returns:
      Phi, float32 where it was narrower; before the first update phi as it was then. The arrays
      are those of the state, which is donated at the next step.

    Raises:
      ValueError: there is none, or more than one.

    Example:
      >>> import jax, jax.numpy as jnp, optax, peftjax as pj
      >>> tx = optax.chain(optax.clip(1.0), pj.moving_average(optax.adam(1e-3), decay=0.99))
      >>> state = pj.start(tx, {'w': {'a': jnp.ones(2)}}, jax.random.key(0))
      >>> pj.averaged(state)['w']['a'].tolist()
      [1.0, 1.0]
    """
    is_one = lambda node: isinstance(node, MovingAverage)
    found = [node for node in jax.tree.leaves(state, is_leaf=is_one) if is_one(node)]
    if len(found) != 1:
        raise ValueError(
            f'there must be one average of phi in the state; there are {len(found)}. Make the '
            'optimizer with moving_average, around all of it'
        )
    return found[0].phi
