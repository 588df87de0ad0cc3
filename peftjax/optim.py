"""Optimizers that train phi and leave theta alone."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from peftjax._types import PyTree


def masked_optimizer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Restricts an optimizer to phi, for those who keep one tree `{'params': θ, 'phi': φ}`.

    `optax.masked` does not freeze: gradients that it does not transform pass through as updates.
    Here the parameters get no state, and an update that leaves every bit as it was (but for
    subnormal numbers, which a backend may flush to zero whenever it adds to them).

    Args:
      tx: the optimizer for phi.

    Returns:
      An optimizer over the combined tree.

    Raises (from `init` and `update`):
      ValueError: the tree has other keys than `params` and `phi`.

    Example:
      >>> import jax.numpy as jnp, optax, peftjax as pj
      >>> tree = {'params': {'w': jnp.ones(3)}, 'phi': {'w': {'a': jnp.ones(2)}}}
      >>> tx = pj.masked_optimizer(optax.sgd(0.5))
      >>> updates, _ = tx.update(tree, tx.init(tree), tree)
      >>> new = optax.apply_updates(tree, updates)
      >>> new['params']['w'].tolist(), new['phi']['w']['a'].tolist()
      ([1.0, 1.0, 1.0], [0.5, 0.5])
    """

    def labels(tree: PyTree) -> PyTree:
        if not isinstance(tree, dict) or set(tree) != {'params', 'phi'}:
            found = sorted(tree) if isinstance(tree, dict) else type(tree).__name__
            raise ValueError(f"the tree must be {{'params': …, 'phi': …}}; got {found}")
        return {name: jax.tree.map(lambda _, name=name: name, tree[name]) for name in tree}

    return optax.partition({'phi': tx, 'params': _still()}, labels)


def _still() -> optax.GradientTransformation:
    """Updates that change nothing: -0.0, since x + 0.0 would turn -0.0 into 0.0."""

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        # the gradient of whole numbers has a dtype that nothing can be added to
        return jax.tree.map(_nothing, updates if params is None else params), state

    def init(params: PyTree) -> optax.OptState:
        del params
        return optax.EmptyState()

    return optax.GradientTransformation(init, update)


def _nothing(leaf: Any) -> Any:
    zeros = jnp.zeros_like(leaf)
    return -zeros if jnp.issubdtype(zeros.dtype, jnp.inexact) else zeros
