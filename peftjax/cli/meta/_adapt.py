"""Adapts to episodes, several at once, and judges them between steps."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from peftjax import chain_optimizer, data
from peftjax.cli._programs import Programs
from peftjax.cli.meta._methods import Rates, Way
from peftjax.cli.meta._space import BODY, HEAD, Space

ROWS = 160
"""Texts of the supports that are adapted to at once: enough for large products, few enough that
what they need stays in the caches."""


class Drawn(NamedTuple):
    """Tasks of one shape.

    Attributes:
      episodes: positions, `(tasks, rows)`.
      counts: how many there are to validate and to test, these among them.
    """

    episodes: data.Episode
    counts: tuple[int, ...]


def descent(rates: Any) -> optax.GradientTransformation:
    """Plain gradient descent, a rate for each part of phi."""
    return chain_optimizer({BODY: optax.sgd(rates[0]), HEAD: optax.sgd(rates[1])})


def adam(rates: Any) -> optax.GradientTransformation:
    """Adam at constant rates, so that what `k` steps give does not depend on how many follow."""
    return chain_optimizer({BODY: optax.adam(rates[0]), HEAD: optax.adam(rates[1])})


class Adapting:
    """One method on tasks of so many ways: a program for each shape of tasks, whatever the rates,
    the sharpness of heads, the number of steps and where it is judged between them.

    Attributes:
      space: the method.
      programs: the programs, their compilation and their memory.
    """

    def __init__(self, theta: Any, space: Space, way: Way, most: int):
        """Compiles nothing yet; `most` is the most steps that will be asked for."""
        self._theta, self.space, self._most = theta, space, most
        self._optimizer = adam if way.tuned else descent
        # a phi as large as theta is adapted alone: several would not stay in memory
        self._rows = 0 if way.recipe == 'full' else ROWS
        self.programs = Programs(jax.jit(self._run))

    def accuracies(
        self, phi: Any, rates: Rates, episodes: Drawn, sharpness: float, steps: Sequence[int]
    ) -> np.ndarray:
        """Accuracies in percent after some numbers of steps.

        Args:
          phi: to begin with, `{'body': …}`.
          rates: of the adaptation.
          episodes: tasks.
          sharpness: of the heads that they begin with.
          steps: after which to judge.

        Returns:
          `(tasks, steps)` float32.
        """
        plan, found = self._plan(sharpness, steps), []
        for some, count in self._batches(episodes):
            found.append(np.asarray(self._call(phi, rates, plan, some))[list(steps), :count].T)
        return np.concatenate(found)

    def milliseconds(self, phi: Any, rates: Rates, episodes: Drawn, sharpness: float) -> float:
        """Of one step on one task, adapted beside as many others as one program takes."""
        some, _ = next(self._batches(episodes))
        plan = self._plan(sharpness, ()) | {'last': np.int32(self._most)}
        jax.block_until_ready(self._call(phi, rates, plan, some))  # compiled, and in the caches
        began = time.perf_counter()
        jax.block_until_ready(self._call(phi, rates, plan, some))
        took = time.perf_counter() - began
        return 1000 * took / len(some.support.labels) / self._most

    def _plan(self, sharpness: float, steps: Sequence[int]) -> dict[str, Any]:
        """After which steps there is something to judge, and the last step."""
        asked = np.isin(np.arange(self._most + 1), steps)
        last = np.int32(max(steps, default=0))
        return {'asked': asked, 'last': last, 'sharpness': np.float32(sharpness)}

    def _batches(self, drawn: Drawn) -> Iterator[tuple[data.Episode, int]]:
        """Episodes in batches of one shape, and how many of each are not there to fill it."""
        episodes, counts = drawn
        count, rows = episodes.support.labels.shape
        size = together(self._rows // rows, counts)
        for start in range(0, count, size):
            index = np.minimum(np.arange(start, start + size), count - 1)
            some = lambda x, index=index: x[index]
            yield jax.tree.map(some, episodes), min(size, count - start)

    def _call(self, phi: Any, rates: Rates, plan: Any, episodes: data.Episode) -> jax.Array:
        numbers = np.asarray(rates, np.float32)
        return self.programs(self._theta, phi, numbers, plan, episodes)

    def _run(self, theta: Any, phi: Any, rates: Any, plan: Any, episodes: Any) -> jax.Array:
        """Accuracies `(most + 1, tasks)`; zero after steps that are not asked for."""
        space, tx, (support, query) = self.space, self._optimizer(rates), episodes
        theta = theta | {'sharpness': plan['sharpness']}

        def begun(shots: data.Shots) -> tuple[Any, Any]:
            own = {**phi, **space.begin(theta, phi, shots)}
            return own, tx.init(own)

        def stepped(own: Any, state: Any, shots: data.Shots) -> tuple[Any, Any]:
            grads = jax.grad(space.loss, argnums=1)(theta, own, shots, None)
            updates, state = tx.update(grads, state, own)
            return optax.apply_updates(own, updates), state

        def judged(found: jax.Array, every: Any, i: jax.Array) -> jax.Array:
            each = jax.vmap(lambda own, shots: space.accuracy(theta, own, shots))
            return found.at[i].set(each(every, query))

        def body(i: jax.Array, carry: Any) -> Any:
            every, states, found = carry
            still = lambda found, *_: found
            found = lax.cond(plan['asked'][i], judged, still, found, every, i)
            every, states = lax.cond(
                i < plan['last'],
                lambda every, states: jax.vmap(stepped)(every, states, support),
                lambda every, states: (every, states),
                every,
                states,
            )
            return every, states, found

        found = jnp.zeros((self._most + 1, len(support.labels)))
        first = (*jax.vmap(begun)(support), found)
        return lax.fori_loop(0, plan['last'] + 1, body, first)[2]


def together(most: int, counts: Sequence[int]) -> int:
    """How many tasks are adapted to at once, so that few are computed only to fill a batch.

    Args:
      most: how many there may be.
      counts: of tasks of one shape, which share a program: to validate, to test.

    Returns:
      A number from 1 to `most`, or a little more than half of it.

    Example:
      >>> together(32, (40, 200)), together(3, (40, 200)), together(0, (40, 200))
      (20, 2, 1)
    """
    filled = lambda size: sum(-count % size for count in counts)
    sizes = range(max(1, most), max(0, most // 2), -1)
    return min(sizes, key=filled)
