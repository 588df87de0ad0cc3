"""Meta-SGD: MAML by gradient descent, whose rates are learned too.

Li et al., Meta-SGD: Learning to Learn Quickly for Few-Shot Learning, 2017, arXiv:1707.09835.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from peftjax._types import Array, Phi, PyTree, Target
from peftjax.meta._inner import chosen, inner, value
from peftjax.meta._learner import Learner, over_tasks, parts
from peftjax.train import LossFn


def meta_sgd(
    loss: LossFn,
    *,
    rate: float,
    steps: int = 1,
    target: Target | None = None,
    elementwise: bool = False,
) -> Learner:
    """MAML with a learned inner rate for each leaf of phi, or for each of its numbers.

    What is trained is `{'phi': phi, 'rates': rates}`; `pj.chain_optimizer({'phi': …, 'rates': …})`
    gives the two their own outer optimizers. A rate may become negative.

    Args:
      loss: `loss(params, phi, batch, key)` to a scalar, or to a `Loss`, whose mean is minimized.
      rate: what all rates begin with.
      steps: of the inner loop, 1 in the paper.
      target: regex, or several, searched in the paths of phi's leaves: those alone adapt, and have
        rates.
      elementwise: a rate for each number, as in the paper, instead of one for each leaf.

    Returns:
      The learner.

    Raises:
      ValueError: as of `maml`, or `rate` is not finite; from `init`, a target finds nothing; what
        is trained is not from `init`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> loss = lambda params, phi, x, key: ((params['w'] + phi['w'] - x) ** 2).sum()
      >>> params, phi = {'w': jnp.ones(1)}, {'w': jnp.zeros(1)}
      >>> tasks, key = (jnp.array([[3.0]]), jnp.array([[3.0]])), jax.random.key(0)
      >>> learner = meta_sgd(loss, rate=0.25)
      >>> trained = learner.init(phi)
      >>> trained
      {'phi': {'w': Array([0.], dtype=float32)}, 'rates': {'w': Array(0.25, dtype=float32)}}
      >>> jax.grad(learner.loss, argnums=1)(params, trained, tasks, key)
      {'phi': {'w': Array([-1.], dtype=float32)}, 'rates': {'w': Array(-8., dtype=float32)}}

    Reference: Li et al., 2017, arXiv:1707.09835, equations 3 and 4.
    """

    if not math.isfinite(rate):
        raise ValueError(f'rate must be finite: received {rate}')

    def init(phi: Phi) -> Phi:
        of = lambda leaf: jnp.full(leaf.shape if elementwise else (), rate, leaf.dtype)
        return {'phi': phi, 'rates': jax.tree.map(of, chosen(target, phi))}

    def adapt(params: PyTree, trained: Phi, support: Any, key: Array) -> Phi:
        phi, rates = parts(trained, 'phi', 'rates')
        return inner(loss, _descent(rates), steps, target)(params, phi, support, key)

    def one(params: PyTree, trained: Phi, task: tuple[Any, Any], key: Array) -> Array:
        support, query = task
        phi = adapt(params, trained, support, key)
        return value(loss, params, phi, query, jax.random.fold_in(key, steps))

    inner(loss, optax.identity(), steps, target)  # refuses what it would when called
    return Learner(init, over_tasks(one), jax.jit(adapt))


def _descent(rates: Any) -> optax.GradientTransformation:
    """Gradient descent with a rate for each leaf, or for each of its numbers."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params  # only gradients matter
        return jax.tree.map(lambda rate, grad: -rate * grad, rates, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)
