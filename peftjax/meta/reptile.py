"""Reptile: phi moves towards where the inner loop ends.

Nichol et al., On First-Order Meta-Learning Algorithms, 2018, arXiv:1803.02999.
"""

from typing import Any

import jax
import optax

from peftjax._types import Array, Phi, PyTree, Target
from peftjax.meta._inner import Begin, begun, inner, value
from peftjax.meta._learner import Learner, over_tasks, with_own_gradient
from peftjax.train import LossFn


def reptile(
    loss: LossFn,
    tx: optax.GradientTransformation,
    *,
    steps: int,
    target: Target | None = None,
    begin: Begin | None = None,
) -> Learner:
    """Reptile: the gradient of a task is phi less what the inner loop makes of it.

    Under `optax.sgd(e)` outside, phi moves by `e` of the way to the mean of the adapted ones. The
    loss is that of the query after adaptation, as MAML's, and is only looked at: phi learns from
    the support alone. So let it be larger than a few shots, and let the loss draw a part of it
    from its key if the steps are to see different examples.

    Args:
      loss: `loss(params, phi, batch, key)` to a scalar, or to a `Loss`, whose mean is minimized.
      tx: the inner optimizer; it is not differentiated through.
      steps: of the inner loop, at least 2: one is training on all tasks together.
      target: regex, or several, searched in the paths of phi's leaves: those alone are trained.
      begin: as of `maml`; what a task begins with beside phi adapts with it, and is not learned.

    Returns:
      The learner; what it trains is phi.

    Raises:
      ValueError: `steps` is less than 2, or as of `maml`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> loss = lambda params, phi, x, key: ((params['w'] + phi['w'] - x) ** 2).sum()
      >>> params, phi = {'w': jnp.ones(1)}, {'w': jnp.zeros(1)}
      >>> tasks, key = (jnp.array([[3.0]]), jnp.array([[3.0]])), jax.random.key(0)
      >>> learner = reptile(loss, optax.sgd(0.25), steps=2)
      >>> jax.value_and_grad(learner.loss, argnums=1)(params, phi, tasks, key)
      (Array(0.25, dtype=float32), {'w': Array([-1.5], dtype=float32)})

    Reference: Nichol et al., 2018, arXiv:1803.02999, section 3, algorithm 2 (batched).
    """
    if steps < 2:
        raise ValueError(
            f'Reptile needs at least 2 steps: received {steps}. After one, its gradient is that of '
            'training on all tasks together'
        )
    steps_of_one = inner(loss, tx, steps, target)

    def adapt(params: PyTree, phi: Phi, support: Any, key: Array) -> Phi:
        return steps_of_one(params, begun(begin, params, phi, support, key), support, key)

    def moved(params: PyTree, phi: Phi, task: tuple[Any, Any], key: Array) -> tuple[Array, Phi]:
        support, query = task
        ended = adapt(params, phi, support, key)
        judged = value(loss, params, ended, query, jax.random.fold_in(key, steps))
        learned = ended if begin is None else {name: ended[name] for name in phi}
        return judged, jax.tree.map(lambda start, end: start - end, phi, learned)

    return Learner(lambda phi: phi, over_tasks(with_own_gradient(moved)), jax.jit(adapt))
