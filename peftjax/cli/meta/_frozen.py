"""Tasks learned on features of the frozen encoder, which are computed once."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peftjax import data, meta
from peftjax.cli._probe import minimum

SHARPNESS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
"""What the softmax over distances is chosen among."""

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
"""Inverse penalties that logistic regression is chosen among."""


def sharpness(features: jax.Array, episodes: data.Episode, ways: int) -> float:
    """The sharpness at which nearest prototypes have the lowest loss on validation episodes."""

    def loss(sharp: jax.Array, support: data.Shots, query: data.Shots) -> jax.Array:
        said = sharp * _nearness(features, support, query, ways)
        return optax.softmax_cross_entropy_with_integer_labels(said, query.labels).mean()

    each = jax.jit(jax.vmap(jax.vmap(loss, (None, 0, 0)), (0, None, None)))
    losses = np.asarray(each(jnp.array(SHARPNESS), *episodes)).mean(1)
    return SHARPNESS[int(losses.argmin())]


def nearest(features: jax.Array, episodes: data.Episode, ways: int) -> np.ndarray:
    """Accuracies `(tasks,)` of the nearest prototype, in percent."""
    said = lambda support, query: _nearness(features, support, query, ways)
    return np.asarray(_accuracies(said)(episodes))


def logistic(
    features: jax.Array, episodes: data.Episode, ways: int, strength: float
) -> tuple[np.ndarray, float]:
    """Logistic regression on each support.

    Returns:
      Accuracies `(tasks,)` in percent, and milliseconds of one fit among all.
    """

    def said(support: data.Shots, query: data.Shots) -> jax.Array:
        x = features[support.inputs]

        def loss(head: dict[str, jax.Array]) -> jax.Array:
            logits = x @ head['kernel'] + head['bias'][None]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, support.labels)
            return strength * losses.sum() + 0.5 * jnp.square(head['kernel']).sum()

        head = {'kernel': jnp.zeros((x.shape[1], ways)), 'bias': jnp.zeros(ways)}
        head = minimum(loss, head)
        return features[query.inputs] @ head['kernel'] + head['bias'][None]

    each = _accuracies(said)
    found = np.asarray(each(episodes))
    began = time.perf_counter()
    each(episodes).block_until_ready()  # compiled by now
    return found, 1000 * (time.perf_counter() - began) / len(found)


def _nearness(features: jax.Array, support: data.Shots, query: data.Shots, ways: int) -> jax.Array:
    means = meta.prototypes(features[support.inputs], jnp.asarray(support.labels), ways)
    return meta.logits(features[query.inputs], means)


def _accuracies(
    said: Callable[[data.Shots, data.Shots], jax.Array],
) -> Callable[[data.Episode], jax.Array]:
    """The accuracy on each task, one task after the other."""

    def one(episode: data.Episode) -> jax.Array:
        support, query = episode
        return 100 * (said(support, query).argmax(-1) == query.labels).mean(dtype=jnp.float32)

    return jax.jit(lambda episodes: jax.lax.map(one, episodes))
