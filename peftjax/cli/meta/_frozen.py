"""Tasks learned on features that no task changes: they are computed once, a text at a time."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peftjax import data, meta
from peftjax.cli._probe import minimum
from peftjax.cli._programs import Programs
from peftjax.cli.meta import _ground
from peftjax.cli.meta._space import Space

SHARPNESS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
"""What the softmax over distances is chosen among."""

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
"""Inverse penalties that logistic regression is chosen among."""


class Features:
    """Features of texts that a phi gives.

    Attributes:
      programs: the program, its compilation and its memory.
    """

    def __init__(self, theta: Any, space: Space):
        """Compiles nothing yet."""
        self._theta, self.programs = theta, Programs(jax.jit(space.embed))

    def of(self, phi: Any, index: np.ndarray) -> jax.Array:
        """Features `(texts, width)`; zero where a text was not asked for.

        Args:
          phi: `{'body': …}`.
          index: positions of texts, in any shape and order; each is looked at once.
        """
        return _ground.encoded(self.programs, self._theta, phi, np.unique(index))

    def accuracies(self, phi: Any, episodes: data.Episode, ways: int) -> np.ndarray:
        """Accuracies `(tasks,)` of the nearest prototype, in percent.

        Args:
          phi: `{'body': …}`.
          episodes: tasks, positions `(tasks, rows)`.
          ways: classes of a task.
        """
        index = np.concatenate([np.ravel(half.inputs) for half in episodes])
        return np.asarray(nearest(self.of(phi, index), episodes, ways))


def sharpness(features: jax.Array, episodes: data.Episode, ways: int) -> float:
    """The sharpness at which nearest prototypes have the lowest loss on validation episodes."""

    def loss(sharp: jax.Array, support: data.Shots, query: data.Shots) -> jax.Array:
        said = sharp * _nearness(features, support, query, ways)
        return optax.softmax_cross_entropy_with_integer_labels(said, query.labels).mean()

    each = jax.jit(jax.vmap(jax.vmap(loss, (None, 0, 0)), (0, None, None)))
    losses = np.asarray(each(jnp.array(SHARPNESS), *episodes)).mean(1)
    return SHARPNESS[int(losses.argmin())]


@functools.partial(jax.jit, static_argnames='ways')
def nearest(features: jax.Array, episodes: data.Episode, ways: int) -> jax.Array:
    """Accuracies `(tasks,)` of the nearest prototype, in percent."""

    def one(episode: data.Episode) -> jax.Array:
        support, query = episode
        return _accuracy(_nearness(features, support, query, ways), query)

    return jax.lax.map(one, episodes)


def logistic(
    features: jax.Array, episodes: data.Episode, ways: int, strength: float
) -> tuple[np.ndarray, float]:
    """Logistic regression on each support; on an accelerator beside all others.

    Returns:
      Accuracies `(tasks,)` in percent, and milliseconds of one fit.
    """
    found = np.asarray(_logistic(features, strength, episodes, ways))
    began = time.perf_counter()
    _logistic(features, strength, episodes, ways).block_until_ready()  # compiled by now
    return found, 1000 * (time.perf_counter() - began) / len(found)


@functools.partial(jax.jit, static_argnames='ways')
def _logistic(
    features: jax.Array, strength: jax.Array, episodes: data.Episode, ways: int
) -> jax.Array:
    def one(episode: data.Episode) -> jax.Array:
        support, query = episode
        x = features[support.inputs]

        def loss(head: dict[str, jax.Array]) -> jax.Array:
            logits = x @ head['kernel'] + head['bias'][None]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, support.labels)
            return strength * losses.sum() + 0.5 * jnp.square(head['kernel']).sum()

        head = minimum(loss, {'kernel': jnp.zeros((x.shape[1], ways)), 'bias': jnp.zeros(ways)})
        return _accuracy(features[query.inputs] @ head['kernel'] + head['bias'][None], query)

    if jax.default_backend() == 'cpu':
        return jax.lax.map(one, episodes)  # side by side all would go on until the last one ends
    return jax.vmap(one)(episodes)


def _accuracy(said: jax.Array, query: data.Shots) -> jax.Array:
    """The part of logits that is right, in percent."""
    return 100 * (said.argmax(-1) == query.labels).mean(dtype=jnp.float32)


def _nearness(features: jax.Array, support: data.Shots, query: data.Shots, ways: int) -> jax.Array:
    means = meta.prototypes(features[support.inputs], jnp.asarray(support.labels), ways)
    return meta.logits(features[query.inputs], means)
