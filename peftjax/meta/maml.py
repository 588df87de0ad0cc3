"""MAML: phi such that a few steps on a task's support do well on its query.

Finn et al., Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, 2017,
arXiv:1703.03400.
"""

from typing import Any

import jax
import optax

from peftjax._types import Array, Phi, PyTree, Target
from peftjax.meta._inner import Begin, begun, inner, value
from peftjax.meta._learner import Learner, over_tasks, with_own_gradient
from peftjax.train import LossFn


def maml(
    loss: LossFn,
    tx: optax.GradientTransformation,
    *,
    steps: int,
    target: Target | None = None,
    first_order: bool = False,
    begin: Begin | None = None,
) -> Learner:
    """Model-agnostic meta-learning, and what is made of it by leaving something out.

    The loss of a task is that of its query after `steps` steps on its support. Its gradient is
    taken through those steps, or, at first order (FOMAML), is the query's gradient where they
    ended. Where only the head adapts (a `target`), it is ANIL; the other leaves are trained by the
    outer steps alone. Over `Trainable(target='.')` it is MAML of the model itself.

    Args:
      loss: `loss(params, phi, batch, key)` to a scalar, or to a `Loss`, whose mean is minimized.
      tx: the inner optimizer; through Adam give it an `eps_root`, see `adapter`.
      steps: of the inner loop.
      target: regex, or several, searched in the paths of phi's leaves: those alone adapt.
      first_order: whether second derivatives are left out.
      begin: `begin(params, phi, support, key)`, what each task begins with beside phi, a dict with
        names of its own, as `{'head': ...}` of the support's prototypes (Proto-MAML). It adapts
        with phi, is not learned itself, and the gradient goes through it, at first order too.

    Returns:
      The learner; what it trains is phi.

    Raises:
      ValueError: `steps` is not positive, or (when called) a target finds nothing, the leaves of
        tasks are not as many, or `begin` gives what phi has.
      TypeError: (when called) tasks are no pair.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> loss = lambda params, phi, x, key: ((params['w'] + phi['w'] - x) ** 2).sum()
      >>> params, phi = {'w': jnp.ones(1)}, {'w': jnp.zeros(1)}
      >>> tasks, key = (jnp.array([[3.0]]), jnp.array([[3.0]])), jax.random.key(0)
      >>> for first_order in (False, True):
      ...     learner = maml(loss, optax.sgd(0.25), steps=2, first_order=first_order)
      ...     jax.value_and_grad(learner.loss, argnums=1)(params, phi, tasks, key)
      (Array(0.25, dtype=float32), {'w': Array([-0.25], dtype=float32)})
      (Array(0.25, dtype=float32), {'w': Array([-1.], dtype=float32)})

    Reference: Finn et al., 2017, arXiv:1703.03400, equation 1 and section 5.2; Nichol et al., On
    First-Order Meta-Learning Algorithms, 2018, arXiv:1803.02999, section 2; Raghu et al., Rapid
    Learning or Feature Reuse?, 2020, arXiv:1909.09157, section 4.
    """
    steps_of_one = inner(loss, tx, steps, target)

    def adapt(params: PyTree, phi: Phi, support: Any, key: Array) -> Phi:
        return steps_of_one(params, begun(begin, params, phi, support, key), support, key)

    def judged(params: PyTree, phi: Phi, query: Any, key: Array) -> Array:
        return value(loss, params, phi, query, jax.random.fold_in(key, steps))

    def one(params: PyTree, phi: Phi, task: tuple[Any, Any], key: Array) -> Array:
        support, query = task
        return judged(params, adapt(params, phi, support, key), query, key)

    def where_it_ended(
        params: PyTree, phi: Phi, task: tuple[Any, Any], key: Array
    ) -> tuple[Array, Phi]:
        support, query = task
        own, back = jax.vjp(lambda phi: begun(begin, params, phi, support, key), phi)
        ended = steps_of_one(params, own, support, key)
        found, gradient = jax.value_and_grad(judged, argnums=1)(params, ended, query, key)
        return found, back(gradient)[0]

    own = with_own_gradient(where_it_ended) if first_order else one
    return Learner(lambda phi: phi, over_tasks(own), jax.jit(adapt))
