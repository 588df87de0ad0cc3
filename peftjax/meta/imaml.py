"""iMAML: the gradient of MAML from where the inner problem is solved, not from how.

Rajeswaran et al., Meta-Learning with Implicit Gradients, 2019, arXiv:1909.04630.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from peftjax._counts import whole
from peftjax._one_pass import wide
from peftjax._types import Array, Phi, PyTree
from peftjax.meta._inner import Adapt, inner, value
from peftjax.meta._learner import Learner, over_tasks, with_own_gradient
from peftjax.train import LossFn


def imaml(
    loss: LossFn,
    tx: optax.GradientTransformation,
    *,
    steps: int,
    strength: float,
    solver_steps: int = 5,
) -> Learner:
    """MAML with implicit gradients: memory and derivative do not depend on the inner steps.

    The inner loop minimizes the loss of the support plus `strength / 2` times the squared distance
    from phi. Where that is solved, the gradient is `(I + H / strength)^-1 g`, of the gradient `g`
    of the query and the Hessian `H` of the support there, found by conjugate gradients. It is as
    good as the inner problem is solved, and needs `strength` above the most negative eigenvalue
    of `H`.

    Args:
      loss: `loss(params, phi, batch, key)` to a scalar, or to a `Loss`, whose mean is minimized.
      tx: the inner optimizer; it is not differentiated through.
      steps: of the inner loop.
      strength: how strongly phi holds what adapts to a task; lambda of the paper.
      solver_steps: of conjugate gradients; each is one product with the Hessian.

    Returns:
      The learner; what it trains is phi, and its `adapt` solves the inner problem.

    Raises:
      ValueError: `steps`, `solver_steps` or `strength` is not positive or `strength` infinite, or
        as of `maml`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> loss = lambda params, phi, x, key: ((params['w'] + phi['w'] - x) ** 2).sum()
      >>> params, phi = {'w': jnp.ones(1)}, {'w': jnp.zeros(1)}
      >>> tasks, key = (jnp.array([[3.0]]), jnp.array([[3.0]])), jax.random.key(0)
      >>> learner = imaml(loss, optax.sgd(0.25), steps=1, strength=2.0)
      >>> jax.value_and_grad(learner.loss, argnums=1)(params, phi, tasks, key)
      (Array(1., dtype=float32), {'w': Array([-1.], dtype=float32)})

    Reference: Rajeswaran et al., 2019, arXiv:1909.04630, equations 3 and 6, algorithm 2.
    """
    if not 0 < strength < math.inf:
        raise ValueError(f'strength must be a positive number: received {strength}')
    whole('solver_steps', solver_steps)
    adapt = _held(loss, tx, steps, strength)

    def implicit(params: PyTree, phi: Phi, task: tuple[Any, Any], key: Array) -> tuple[Array, Phi]:
        support, query = task
        ended = adapt(params, phi, support, key)
        own, again = (jax.random.fold_in(key, steps + i) for i in range(2))
        judged = lambda phi: value(loss, params, phi, query, own)
        found, gradient = jax.value_and_grad(judged)(ended)
        slope = jax.grad(lambda phi: value(loss, params, phi, support, again))
        # reverse mode twice: a loss with a derivative of its own may have no other
        curved = jax.vjp(slope, ended)[1]
        product = lambda v: jax.tree.map(lambda x, h: x + h / strength, v, curved(v)[0])
        return found, _solved(product, gradient, solver_steps)

    return Learner(lambda phi: phi, over_tasks(with_own_gradient(implicit)), jax.jit(adapt))


def _held(loss: LossFn, tx: optax.GradientTransformation, steps: int, strength: float) -> Adapt:
    """The inner loop, with what adapts held near phi."""
    inner(loss, tx, steps)  # refuses what it would when called

    def adapt(params: PyTree, phi: Phi, support: Any, key: Array) -> Phi:
        def near(params: PyTree, mine: Phi, batch: Any, key: Array) -> Array:
            squares = [
                jnp.square(new - old).sum()
                for new, old in zip(jax.tree.leaves(mine), jax.tree.leaves(phi), strict=True)
            ]
            found = value(loss, params, mine, batch, key)
            return found + sum(strength / 2 * square.astype(found.dtype) for square in squares)

        return inner(near, tx, steps)(params, phi, support, key)

    return adapt


def _solved(product: Callable[[Phi], Phi], wanted: Phi, steps: int) -> Phi:
    """What a symmetric positive product makes `wanted` of, by conjugate gradients.

    So many steps and no test whether they suffice: tasks on several devices would have to agree.
    """

    def step(carry: Any, _: None) -> tuple[Any, None]:
        found, left, along, square = carry
        made = product(along)
        far = _ratio(square, _dot(along, made))
        found, left = _moved(found, along, far), _moved(left, made, -far)
        new = _dot(left, left)
        return (found, left, _moved(left, along, _ratio(new, square)), new), None

    nothing = jax.tree.map(jnp.zeros_like, wanted)
    start = (nothing, wanted, wanted, _dot(wanted, wanted))
    return lax.scan(step, start, length=steps)[0][0]


def _dot(left: Phi, right: Phi) -> Array:
    """In float32 or wider."""
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    sums = [jnp.sum(a.astype(wide(a.dtype)) * b.astype(wide(b.dtype))) for a, b in pairs]
    own = max((x.dtype for x in sums), key=lambda dtype: dtype.itemsize)
    return jnp.stack([x.astype(own) for x in sums]).sum()


def _moved(tree: Phi, along: Phi, by: Array) -> Phi:
    return jax.tree.map(lambda x, d: x + by.astype(x.dtype) * d, tree, along)


def _ratio(a: Array, b: Array) -> Array:
    """Zero where all is solved."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))
