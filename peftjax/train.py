"""Training phi: a state and a pure, jitted, donated step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from peftjax._types import Array, Phi, PyTree

LossFn = Callable[[PyTree, Phi, Any, Array], Array]
"""`loss_fn(params, phi, batch, key) -> scalar`."""


class TrainState(NamedTuple):
    """All that changes while phi is trained.

    Attributes:
      phi: the trained parameters.
      opt_state: of the optimizer, over phi only.
      step: int32, the number of updates made.
      key: PRNG key; each step draws from `fold_in(key, step)`.
    """

    phi: Phi
    opt_state: optax.OptState
    step: Array
    key: Array


Step = Callable[[PyTree, TrainState, Any], tuple[TrainState, Array]]
"""`step(params, state, batch) -> (state, loss)`."""


def start(tx: optax.GradientTransformation, phi: Phi, key: Array) -> TrainState:
    """The state before the first step.

    Args:
      tx: the optimizer.
      phi: as from `Peft.init`.
      key: typed PRNG key, for dropout and whatever else a loss draws.

    Returns:
      The state.
    """
    return TrainState(phi, tx.init(phi), jax.numpy.zeros((), jax.numpy.int32), key)


def train_step(loss_fn: LossFn, tx: optax.GradientTransformation) -> Step:
    """Makes one jitted update of phi; theta is an argument and gets no gradient.

    Args:
      loss_fn: `loss_fn(params, phi, batch, key) -> scalar`.
      tx: the optimizer.

    Returns:
      `step(params, state, batch) -> (state, loss)`. The state is donated: use the new one.

    Example:
      >>> import jax, jax.numpy as jnp, optax, peftjax as pj
      >>> params, x = {'kernel': jnp.ones((3, 4))}, jnp.ones((2, 3))
      >>> model = lambda params, x: x @ params['kernel']
      >>> forward, phi = pj.lora_wrap(
      ...     model, params, x, key=jax.random.key(0), rank=2, target='kernel')
      >>> loss_fn = lambda params, phi, x, key: (forward(params, phi, x) ** 2).mean()
      >>> tx = optax.adam(1e-1)
      >>> step, state = pj.train_step(loss_fn, tx), pj.start(tx, phi, jax.random.key(1))
      >>> losses = []
      >>> for _ in range(3):
      ...     state, loss = step(params, state, x)
      ...     losses.append(float(loss))
      >>> losses[0] > losses[2]
      True
    """

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params: PyTree, state: TrainState, batch: Any) -> tuple[TrainState, Array]:
        key = jax.random.fold_in(state.key, state.step)
        loss, grads = jax.value_and_grad(loss_fn, argnums=1)(params, state.phi, batch, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.phi)
        phi: Any = optax.apply_updates(state.phi, updates)  # optax has a narrower type for trees
        return TrainState(phi, opt_state, state.step + 1, state.key), loss

    return step
