"""Optimizers that train phi and leave theta alone."""

import math
from collections.abc import Hashable, Mapping
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


def chain_optimizer(
    optimizers: Mapping[str, optax.GradientTransformation],
) -> optax.GradientTransformation:
    """Gives each method of a chain an optimizer of its own.

    What is to act on all of phi at once, such as clipping by the norm of all gradients, stands
    before it in `optax.chain`.

    Args:
      optimizers: one for each top key of phi, that is for each name in the chain.

    Returns:
      An optimizer over the phi of the chain.

    Raises (from `init` and `update`):
      ValueError: phi has a key without an optimizer, or there is an optimizer without a key.

    Example:
      >>> import jax.numpy as jnp, optax, peftjax as pj
      >>> phi = {'lora': {'w': {'a': jnp.ones(2)}}, 'head': {'out': {'value': jnp.ones(2)}}}
      >>> tx = pj.chain_optimizer({'lora': optax.sgd(0.5), 'head': optax.sgd(0.25)})
      >>> updates, _ = tx.update(phi, tx.init(phi), phi)
      >>> updates['lora']['w']['a'].tolist(), updates['head']['out']['value'].tolist()
      ([-0.5, -0.5], [-0.25, -0.25])
    """

    def labels(phi: PyTree) -> PyTree:
        if _is_placeholder(phi):
            return phi
        found = set(phi) if isinstance(phi, Mapping) else set()
        if wrong := found.symmetric_difference(optimizers):
            raise ValueError(
                f"there must be an optimizer for each of phi's keys {sorted(found)}; without one: "
                f'{sorted(wrong & found)}, without a key: {sorted(wrong - found)}. Name them as '
                'the chain names its methods'
            )
        return {name: name for name in phi}

    each: dict[Hashable, Any] = {**optimizers}
    return optax.partition(each, labels)


def lora_plus(ratio: float) -> optax.GradientTransformation:
    """Gives every `b` of phi a learning rate `ratio` times that of everything else.

    It multiplies updates, so it stands behind an optimizer whose updates are proportional to its
    rate, weight decay included: those of SGD, Adam, AdamW, Lion and most others, with any schedule.
    Where they are not (schedule-free optimizers, those that find the rate themselves), use
    `optax.partition`.

    Everything else has the optimizer's own rate: biases, magnitudes, heads. PEFT's `loraplus` gives
    vectors the rate of `b`, and the pairs of embeddings, where `a` starts at zero, a third one.

    Args:
      ratio: the rate of `b` over that of `a`, above 1 in the paper.

    Returns:
      A transformation for `optax.chain(optimizer, lora_plus(16))`. The pairs are found wherever phi
      has an `a` and a `b` side by side: of `Lora` and `Dora`, under `chain` at any depth.

    Raises:
      ValueError: `ratio` is not a positive number, or (from `init`) phi has no such pair.

    Example:
      >>> import jax.numpy as jnp, optax, peftjax as pj
      >>> phi = {'w': {'a': jnp.ones(2), 'b': jnp.ones(2)}}
      >>> tx = optax.chain(optax.sgd(0.25), pj.lora_plus(16))
      >>> updates, _ = tx.update(phi, tx.init(phi), phi)
      >>> updates['w']['a'].tolist(), updates['w']['b'].tolist()
      ([-0.25, -0.25], [-4.0, -4.0])

    Reference: Hayou et al., LoRA+: Efficient Low Rank Adaptation of Large Models, 2024,
    arXiv:2402.12354: the rates of A and B differ by a fixed ratio.
    """
    if not (ratio > 0 and math.isfinite(ratio)):
        raise ValueError(f'ratio must be a positive number: received {ratio}')

    def init(params: PyTree) -> optax.OptState:
        if not _pairs(params) and not _is_placeholder(params):
            keys = sorted(params) if isinstance(params, Mapping) else type(params).__name__
            raise ValueError(
                'LoRA+ is for pairs of a and b, as Lora and Dora have them; there are none, the '
                f'keys are {keys}. Leave lora_plus out, or let the target find a and b'
            )
        return optax.EmptyState()

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        del params  # the updates have the same paths
        return _scaled(updates, ratio), state

    return optax.GradientTransformation(init, update)


def _is_placeholder(tree: PyTree) -> bool:
    """Whether it stands for phi where optax asks which parts of a state are of phi."""
    return not isinstance(tree, Mapping) and not jax.tree.leaves(tree)


def _is_pair(tree: Any) -> bool:
    """Whether a and b are arrays here: a parameter and a method may be named so too."""
    return isinstance(tree, Mapping) and all(
        jax.tree_util.all_leaves([tree.get(name)]) for name in ('a', 'b')
    )


def _pairs(tree: PyTree) -> int:
    """How many pairs there are."""
    if not isinstance(tree, Mapping):
        return 0
    return int(_is_pair(tree)) + sum(map(_pairs, tree.values()))


def _scaled(tree: PyTree, ratio: float) -> PyTree:
    """The same with every b of a pair multiplied."""
    if not isinstance(tree, Mapping):
        return tree
    found = {name: _scaled(value, ratio) for name, value in tree.items()}
    return {**found, 'b': found['b'] * float(ratio)} if _is_pair(tree) else found


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
