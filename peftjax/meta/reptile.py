"""Reptile: phi moves towards where the inner loop ends.

Nichol et al., On First-Order Meta-Learning Algorithms, 2018, arXiv:1803.02999.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from peftjax._counts import whole
from peftjax._types import Array, Phi, PyTree, Target
from peftjax.meta._inner import Begin, begun, chosen, inner, loop, value
from peftjax.meta._learner import Learner, over_tasks, parts, with_own_gradient
from peftjax.train import LossFn


def reptile(
    loss: LossFn,
    tx: optax.GradientTransformation,
    *,
    steps: int,
    target: Target | None = None,
    begin: Begin | None = None,
    carry: bool = False,
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
      carry: whether tasks begin with the state that the inner optimizer has come to, not a fresh
        one. A fresh Adam's first steps are as long where a gradient is noise as where it is large,
        and as long where a task is solved as where it is not. The authors' code carries it.

    Returns:
      The learner; what it trains is phi, or `{'phi': phi, 'inner': leaves}` with the leaves of
      the state beside it (counts in float32), whose outer optimizer is to be `optax.sgd(1.0)`: they
      become the mean of where the tasks ended. `pj.chain_optimizer({'phi': …, 'inner': …})`
      gives the two their own.

    Raises:
      ValueError: `steps` is less than 2, `begin` with `carry` (what only a task has would have no
        state), or as of `maml`; with `carry`, what is trained is not from `init`.

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
    if whole('steps', steps) < 2:
        raise ValueError(
            f'Reptile needs at least 2 steps: received {steps}. After one, its gradient is that of '
            'training on all tasks together'
        )
    if carry:
        if begin is not None:
            raise ValueError(
                'carry goes without begin: what a task alone begins with has no state that another '
                'task could hand on. Leave one of the two out'
            )
        return _carrying(loss, tx, steps, target)
    steps_of_one = inner(loss, tx, steps, target)

    def adapt(params: PyTree, phi: Phi, support: Any, key: Array) -> Phi:
        return steps_of_one(params, begun(begin, params, phi, support, key), support, key)

    def moved(params: PyTree, phi: Phi, task: tuple[Any, Any], key: Array) -> tuple[Array, Phi]:
        support, query = task
        ended = adapt(params, phi, support, key)
        judged = value(loss, params, ended, query, jax.random.fold_in(key, steps))
        learned = ended if begin is None else {name: ended[name] for name in phi}
        return judged, _less(phi, learned)

    return Learner(lambda phi: phi, over_tasks(with_own_gradient(moved)), jax.jit(adapt))


def _carrying(
    loss: LossFn, tx: optax.GradientTransformation, steps: int, target: Target | None
) -> Learner:
    """Reptile of phi and of the inner optimizer's state together."""
    go = loop(loss, tx, steps, target)

    def init(phi: Phi) -> Phi:
        return {'phi': phi, 'inner': _floating(tx.init(chosen(target, phi)))}

    def ended(params: PyTree, trained: Phi, support: Any, key: Array) -> Phi:
        phi, leaves = parts(trained, 'phi', 'inner')
        shapes, whole = jax.tree.flatten(jax.eval_shape(tx.init, chosen(target, phi)))
        if (found := [x.shape for x in leaves]) != (own := [x.shape for x in shapes]):
            raise ValueError(
                f'the state that this learner hands on has leaves of shapes {own}: received '
                f'{found}. Adapt by the learner that it was trained with'
            )
        pairs = zip(leaves, shapes, strict=True)
        state = whole.unflatten([_as(leaf, shape.dtype) for leaf, shape in pairs])
        phi, state = go(params, phi, state, support, key)
        return {'phi': phi, 'inner': _floating(state)}

    def moved(params: PyTree, trained: Phi, task: tuple[Any, Any], key: Array) -> tuple[Array, Phi]:
        support, query = task
        found = ended(params, trained, support, key)
        judged = value(loss, params, found['phi'], query, jax.random.fold_in(key, steps))
        return judged, _less(trained, found)

    def adapt(params: PyTree, trained: Phi, support: Any, key: Array) -> Phi:
        return ended(params, trained, support, key)['phi']

    return Learner(init, over_tasks(with_own_gradient(moved)), jax.jit(adapt))


def _floating(state: Any) -> list[Array]:
    """The leaves of a state, which have gradients. A count is exact in float32 up to 2^24.

    Raises:
      TypeError: one is a key, of which there is no mean.
    """
    if any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(state)):
        raise TypeError(
            'the state of an optimizer that draws cannot be handed on from task to task: there is '
            'no mean of keys. Leave carry out, or take an inner optimizer without noise'
        )
    floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    return [x if floating(x) else x.astype(jnp.float32) for x in jax.tree.leaves(state)]


def _as(leaf: Array, dtype: Any) -> Array:
    """A leaf of a state in its own dtype; means of a count are a rounding away from it."""
    counts = jnp.issubdtype(dtype, jnp.integer)
    return (jnp.round(leaf) if counts else leaf).astype(dtype)


def _less(start: Phi, end: Phi) -> Phi:
    return jax.tree.map(lambda one, other: one - other, start, end)
