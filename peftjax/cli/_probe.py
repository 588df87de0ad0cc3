"""Logistic regression on the features of the frozen encoder."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peftjax import data
from peftjax.cli._programs import Programs
from peftjax.cli._task import Task

Head = dict[str, jax.Array]

STRENGTH = 10.0
"""Inverse of the penalty on features of length one (`C` of the usual libraries)."""

STILL = 3
"""Steps in a row that change nothing, after which none will."""


def fit_probe(task: Task, tokens: data.Tokens, labels: np.ndarray) -> tuple[Head, int]:
    """Fits the classifier alone, by L-BFGS, to its one optimum.

    Args:
      task: the encoder.
      tokens: of the examples.
      labels: `(n,)` integers.

    Returns:
      `{'kernel': (features, labels), 'bias': (labels,)}`, and the bytes of the compiled encoder.
    """
    programs = Programs(jax.jit(task.features))
    features = task.each(lambda batch: programs(task.params, batch), tokens)
    scale = float(np.sqrt(np.square(features).sum(-1).mean()))
    count = len(task.names)
    x = jnp.asarray(features / scale)
    zeros = {'kernel': jnp.zeros((x.shape[1], count)), 'bias': jnp.zeros(count)}

    def loss(head: Head) -> jax.Array:
        logits = x @ head['kernel'] + head['bias'][None]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels))
        return STRENGTH * losses.sum() + 0.5 * jnp.square(head['kernel']).sum()

    head = minimum(loss, zeros)
    return {'kernel': head['kernel'] / scale, 'bias': head['bias']}, programs.peak_bytes


def minimum(
    loss: Callable[[Head], jax.Array], head: Head, most: int = 500, tolerance: float = 1e-5
) -> Head:
    """The minimum of a convex function, by L-BFGS, as exactly as its dtype has it: it ends where
    the gradient vanishes, or where steps change the numbers no more.

    Products are in full precision: with those that an accelerator takes by default a line search
    stands still far from the minimum.
    """
    tx, norm = optax.lbfgs(), optax.tree.norm
    value_and_grad = optax.value_and_grad_from_state(loss)

    def body(carry: Any) -> Any:
        head, state, _, stood, step = carry
        value, grad = value_and_grad(head, state=state)
        updates, state = tx.update(grad, state, head, value=value, grad=grad, value_fn=loss)
        head = optax.apply_updates(head, updates)
        moved = norm(updates) > jnp.finfo(jnp.result_type(value)).eps * norm(head)
        size = norm(grad) / (1 + jnp.abs(value))
        return head, state, size, jnp.where(moved, 0, stood + 1), step + 1

    def more(carry: Any) -> jax.Array:
        _, _, size, stood, step = carry
        return (size > tolerance) & (stood < STILL) & (step < most)

    first = (head, tx.init(head), jnp.array(jnp.inf), jnp.array(0), jnp.array(0))
    with jax.default_matmul_precision('highest'):
        return jax.jit(lambda carry: jax.lax.while_loop(more, body, carry))(first)[0]
