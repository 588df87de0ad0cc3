"""The inner loop: phi adapted to one task."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from peftjax import _paths
from peftjax._counts import whole
from peftjax._scalar import scalar
from peftjax._types import Array, Phi, PyTree, Target
from peftjax.losses import Loss
from peftjax.train import LossFn

Adapt = Callable[[PyTree, Phi, Any, Array], Phi]
"""`adapt(params, phi, support, key) -> phi`, of one task."""

Begin = Callable[[PyTree, Phi, Any, Array], Mapping[str, Any]]
"""`begin(params, phi, support, key)`, what a task begins with beside phi, by names of its own."""


def adapter(
    loss: LossFn, tx: optax.GradientTransformation, *, steps: int, target: Target | None = None
) -> Adapt:
    """Makes the function that adapts phi to one task, jitted once for all tasks of one shape.

    Every task begins with a fresh state of the optimizer; step `i` draws from `fold_in(key, i)`.
    The derivative with respect to phi is exact, of any order. For it the loop keeps phi and the
    optimizer's state of each step, and computes everything else again.

    Args:
      loss: `loss(params, phi, batch, key)` to a scalar, or to a `Loss`, whose mean is minimized.
      tx: the inner optimizer. What is differentiated through must have a derivative: Adam's square
        root has none at zero, where the gradient of LoRA's `a` is while `b` is zero, so give it
        an `eps_root`, as `optax.adam(1e-3, eps_root=1e-8)`. It is told the loss, as
        `optax.polyak_sgd` needs it; a line search, which needs the function, does not run.
      steps: how many; each sees all of the support. A loss may draw a part of it from its key.
      target: regex, or several, searched in the paths of phi's leaves: those alone adapt.

    Returns:
      `adapt(params, phi, support, key) -> phi`; `jax.vmap` of it adapts to many tasks.

    Raises:
      ValueError: `steps` is not positive, or (when called) a target finds nothing.
      TypeError: `target` is no regular expression and not several of them; (when called) the loss
        is no scalar.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> loss = lambda params, phi, x, key: ((params['w'] + phi['w'] - x) ** 2).sum()
      >>> adapt = adapter(loss, optax.sgd(0.25), steps=2)
      >>> params, phi = {'w': jnp.ones(2)}, {'w': jnp.zeros(2)}
      >>> adapt(params, phi, jnp.array([1.0, 5.0]), jax.random.key(0))['w'].tolist()
      [0.0, 3.0]
    """
    return jax.jit(inner(loss, tx, steps, target))


def inner(
    loss: LossFn, tx: optax.GradientTransformation, steps: int, target: Target | None = None
) -> Adapt:
    """The same, not jitted."""
    go = loop(loss, tx, steps, target)

    def adapt(params: PyTree, phi: Phi, support: Any, key: Array) -> Phi:
        return go(params, phi, tx.init(chosen(target, phi)), support, key)[0]

    return adapt


def loop(
    loss: LossFn, tx: optax.GradientTransformation, steps: int, target: Target | None = None
) -> Callable[..., tuple[Phi, Any]]:
    """`go(params, phi, state, support, key) -> (phi, state)`, from any state of the optimizer."""
    whole('steps', steps)
    if target is not None:
        _paths.patterns(target)
    informed = optax.with_extra_args_support(tx)

    def go(params: PyTree, phi: Phi, state: Any, support: Any, key: Array) -> tuple[Phi, Any]:
        def step(carry: Any, i: Array) -> tuple[Any, None]:
            mine, state = carry
            own = jax.random.fold_in(key, i)
            of = lambda mine: value(loss, params, joined(mine, phi), support, own)
            found, grads = jax.value_and_grad(of)(mine)
            updates, state = informed.update(grads, state, mine, value=found)
            return (optax.apply_updates(mine, updates), state), None

        # a scan is no place where XLA could find the same computation twice
        again = jax.checkpoint(step, prevent_cse=False)
        (mine, state), _ = lax.scan(again, (chosen(target, phi), state), jnp.arange(steps))
        return joined(mine, phi), state

    return go


def begun(begin: Begin | None, params: PyTree, phi: Phi, support: Any, key: Array) -> Phi:
    """Phi, and beside it what this task begins with.

    Raises:
      ValueError: phi has a part of that name, which a task would begin without.
      TypeError: it is no dict.
    """
    if begin is None:
        return phi
    own = begin(params, phi, support, key)
    if not isinstance(own, Mapping):
        raise TypeError(
            f'begin must give a dict of what stands beside phi: received {type(own).__name__}. '
            "Name it, as {'head': …}"
        )
    if both := sorted(set(phi) & set(own)):
        raise ValueError(
            f'what begin gives must stand beside phi: both have {both}. Give it another name, or '
            'leave it out of phi'
        )
    return {**phi, **own}


def value(loss: LossFn, params: PyTree, phi: Phi, batch: Any, key: Array) -> Array:
    """A loss as the scalar that is minimized.

    Raises:
      TypeError: it is none.
    """
    found = loss(params, phi, batch, key)
    return found.mean if isinstance(found, Loss) else scalar(found)


def chosen(target: Target | None, phi: Phi) -> Any:
    """Phi with nothing in place of the leaves that a target does not find.

    Raises:
      ValueError: a pattern finds nothing.
    """
    if target is None:
        return phi
    found = set(_paths.selected(target, _paths.leaves(phi)))
    return _paths.mapped(lambda path, leaf: leaf if path in found else None, phi)


def joined(mine: Any, phi: Phi) -> Any:
    """Phi with what was chosen of it replaced."""
    own = lambda new, old: old if new is None else new
    return jax.tree.map(own, mine, phi, is_leaf=lambda leaf: leaf is None)
