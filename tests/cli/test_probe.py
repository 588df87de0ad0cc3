"""Logistic regression to its optimum, as exactly as float32 has it, on any device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peftjax.cli._probe import minimum

LABELS = jnp.repeat(jnp.arange(3), 5)
X = jnp.asarray(np.random.default_rng(0).normal(size=(15, 8)) / 8**0.5, jnp.float32)
ZEROS = {'kernel': jnp.zeros((8, 3)), 'bias': jnp.zeros(3)}


def loss(head):
    losses = optax.softmax_cross_entropy_with_integer_labels(
        X @ head['kernel'] + head['bias'][None], LABELS
    )
    return 10 * losses.sum() + 0.5 * jnp.square(head['kernel']).sum()


def test_the_gradient_vanishes_there():
    first, last = (optax.tree.norm(jax.grad(loss)(head)) for head in (ZEROS, minimum(loss, ZEROS)))
    assert last < 1e-4 * first


def test_products_are_in_full_precision_where_the_default_is_coarse():
    """With 10 bits of mantissa, as GPUs multiply by default, the line search stands still far from
    the minimum, and a fit goes on to its last step."""
    text = jax.jit(lambda head: minimum(loss, head)).lower(ZEROS).as_text()
    dots = [line for line in text.splitlines() if 'dot_general' in line]
    assert len(dots) >= 2  # of the step and of the line search
    assert all(line.count('HIGHEST') == 2 for line in dots)


def test_it_ends_where_float32_comes_no_nearer():
    """A strong pull of few examples: the line search stands still before the gradient is as small
    as it is to be, and went on to 500 steps of twenty evaluations each."""
    rng, seen = np.random.default_rng(1), []
    x = rng.normal(size=(5, 1, 64)) + rng.normal(size=(5, 5, 64))
    x = jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32).reshape(25, 64)
    labels = jnp.repeat(jnp.arange(5), 5)

    def strong(head):
        jax.debug.callback(lambda: seen.append(1))
        logits = x @ head['kernel'] + head['bias'][None]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return 1000 * losses.sum() + 0.5 * jnp.square(head['kernel']).sum()

    zeros = {'kernel': jnp.zeros((64, 5)), 'bias': jnp.zeros(5)}
    head = jax.block_until_ready(minimum(strong, zeros))
    assert len(seen) < 1000
    first, last = (optax.tree.norm(jax.grad(strong)(head)) for head in (zeros, head))
    assert last < 1e-4 * first
