"""Adapts to episodes, several at once, and judges them between steps."""

import itertools
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
from peftjax.cli.meta._parts import Parts
from peftjax.cli.meta._space import BODY, HEAD, Space

TIMED = 10
"""Steps whose time is taken."""


class Room(NamedTuple):
    """How much is adapted at once.

    Attributes:
      rows: texts of supports.
      whole: tasks, where each has a phi as large as theta.
    """

    rows: int
    whole: int


CACHES = Room(160, 1)
"""On a CPU: enough for large products, few enough that what they need stays in the caches."""

ACCELERATOR = Room(2048, 16)
"""Elsewhere: enough that a step is longer than its launch, few enough for several processes on one
device."""


def room(backend: str) -> Room:
    """How much is adapted at once on a backend.

    Args:
      backend: as `jax.default_backend()` says it.
    """
    return CACHES if backend == 'cpu' else ACCELERATOR


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

    def __init__(self, theta: Any, space: Space, way: Way, most: int, counts: Sequence[int]):
        """Compiles nothing yet.

        Args:
          theta: the encoder and its texts.
          space: the method.
          way: which optimizer adapts, and how large phi is.
          most: the most steps that will be asked for.
          counts: tasks that will be asked for at once, as `together` takes them.
        """
        self._theta, self.space, self._most, self._counts = theta, space, most, counts
        self._optimizer = adam if way.fit == 'adam' else descent
        self._whole = way.recipe == 'full'
        self.programs = Programs(jax.jit(self._run))

    def accuracies(
        self,
        phi: Any,
        rates: Sequence[Rates],
        episodes: data.Episode,
        sharpness: float,
        steps: Sequence[int],
        parts: Parts | None = None,
        name: str = '',
    ) -> np.ndarray:
        """Accuracies in percent after some numbers of steps.

        Args:
          phi: to begin with, `{'body': …}`.
          rates: of the adaptation; each task is adapted to at each of them.
          episodes: tasks, positions `(tasks, rows)`.
          sharpness: of the heads that they begin with.
          steps: after which to judge.
          parts: where batches are kept, and those that an earlier run has made are taken from.
          name: of these there.

        Returns:
          `(rates, tasks, steps)` float32.
        """
        plan, found = self._plan(sharpness, steps), parts.of(name) if parts else []
        for jobs, count in itertools.islice(self._batches(rates, episodes), len(found), None):
            done = self.programs(self._theta, phi, plan, jobs)
            found.append(np.asarray(done)[list(steps), :count].T)
            if parts:
                parts.add(name, found[-1])
        return np.concatenate(found).reshape(len(rates), -1, len(steps))

    def milliseconds(
        self, phi: Any, rates: Rates, episodes: data.Episode, sharpness: float
    ) -> float:
        """Of one step on one task, adapted beside as many others as one program takes."""
        jobs, _ = next(self._batches([rates], episodes))
        last = min(TIMED, self._most)
        plan = self._plan(sharpness, ())
        run = lambda last: jax.block_until_ready(
            self.programs(self._theta, phi, plan | {'last': np.int32(last)}, jobs)
        )
        run(1)  # compiled, and in the caches
        began = time.perf_counter()
        run(last)
        return 1000 * (time.perf_counter() - began) / len(jobs[0]) / last

    def _plan(self, sharpness: float, steps: Sequence[int]) -> dict[str, Any]:
        """After which steps there is something to judge, and the last step."""
        asked = np.isin(np.arange(self._most + 1), steps)
        last = np.int32(max(steps, default=0))
        return {'asked': asked, 'last': last, 'sharpness': np.float32(sharpness)}

    def _batches(
        self, rates: Sequence[Rates], episodes: data.Episode
    ) -> Iterator[tuple[tuple[np.ndarray, data.Episode], int]]:
        """Every task with all rates, in batches of one shape, and how many of each are none that
        only fill it."""
        tasks, rows = episodes.support.labels.shape
        own, count = room(jax.default_backend()), len(rates) * tasks
        size = together(own.whole if self._whole else own.rows // rows, self._counts)
        numbers = np.asarray(rates, np.float32)
        for start in range(0, count, size):
            index = np.minimum(np.arange(start, start + size), count - 1)
            some = lambda x, index=index: x[index % tasks]
            yield (numbers[index // tasks], jax.tree.map(some, episodes)), min(size, count - start)

    def _run(self, theta: Any, phi: Any, plan: Any, jobs: Any) -> jax.Array:
        """Accuracies `(most + 1, tasks)`; zero after steps that are not asked for."""
        space, (rates, (support, query)) = self.space, jobs
        theta = theta | {'sharpness': plan['sharpness']}

        def begun(rates: jax.Array, shots: data.Shots) -> tuple[Any, Any]:
            own = {**phi, **space.begin(theta, phi, shots)}
            return own, self._optimizer(rates).init(own)

        def stepped(rates: Any, own: Any, state: Any, shots: data.Shots) -> tuple[Any, Any]:
            grads = jax.grad(space.loss, argnums=1)(theta, own, shots, None)
            updates, state = self._optimizer(rates).update(grads, state, own)
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
                lambda every, states: jax.vmap(stepped)(rates, every, states, support),
                lambda every, states: (every, states),
                every,
                states,
            )
            return every, states, found

        found = jnp.zeros((self._most + 1, len(support.labels)))
        first = (*jax.vmap(begun)(rates, support), found)
        return lax.fori_loop(0, plan['last'] + 1, body, first)[2]


def together(most: int, counts: Sequence[int]) -> int:
    """How many tasks are adapted to at once, so that few are computed only to fill a batch.

    Args:
      most: how many there may be.
      counts: of tasks of one shape, which share a program: to validate at all rates, to test.

    Returns:
      A number from 1 to `most`, at least half of it, or of the larger count where that is less.

    Example:
      >>> together(32, (40, 200)), together(3, (40, 200)), together(0, (40, 200))
      (20, 2, 1)
      >>> together(400, (96, 200))
      100
    """
    most = min(most, max(counts))
    filled = lambda size: sum(-count % size for count in counts)
    sizes = range(max(1, most), (max(1, most) - 1) // 2, -1)
    return min(sizes, key=filled)
