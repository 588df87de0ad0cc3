"""Few-shot tasks from labels alone: N ways, K shots, Q queries."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from peftjax._counts import whole

DRAWN = 2
"""The number of the way of drawing: a run that saw tasks of another does not go on with these."""


class Shots(NamedTuple):
    """Examples of a task, or of several.

    Attributes:
      inputs: `([tasks,] rows)` int32 positions in the data set, or what was made of them:
        arrays `([tasks,] rows, ...)`.
      labels: `([tasks,] rows)` int32, from 0 to `ways - 1`, whatever the classes are called
        elsewhere.
    """

    inputs: Any
    labels: np.ndarray


class Episode(NamedTuple):
    """A few-shot task, or several: a pair `(support, query)`, as `peftjax.meta` takes it.

    Attributes:
      support: examples to adapt on.
      query: others of the same classes, to be judged on.
    """

    support: Shots
    query: Shots


class Episodes(Iterator[Episode]):
    """Few-shot tasks without end: N-way, K-shot, Q queries.

    For each task `ways` classes are drawn, and of each `shots + queries` examples, all without
    replacement; rows come class after class. What is drawn depends on the seed and on how many
    batches came before, so that `restore` goes anywhere at once.

    Args:
      labels: `(n,)` integers, the class of every example: texts, images or anything else.
      ways: classes of a task.
      shots: examples of each class in the support.
      queries: examples of each class in the query.
      tasks: how many a batch has.
      seed: of the draw.
      rows: `rows(positions)`, what to give for int32 positions `(tasks, rows)`, as
        `lambda index: images[index]`. By default the positions themselves, for a loss that looks
        examples up where they lie.

    Raises:
      ValueError: there are fewer classes than `ways`, a class has fewer examples than
        `shots + queries`, labels are not one integer for each example, a number is not positive, or
        the seed negative; from `restore`, a state of other labels, numbers or another seed.
      TypeError: a number or the seed is no integer.

    Example:
      >>> import itertools
      >>> labels = np.repeat([7, 8, 9], 4)
      >>> episodes = Episodes(labels, ways=2, shots=1, queries=3, tasks=5, seed=0)
      >>> support, query = next(episodes)
      >>> support.inputs.shape, query.inputs.shape, support.labels[0].tolist()
      ((5, 2), (5, 6), [0, 1])
      >>> bool((labels[query.inputs] == labels[support.inputs][:, [0, 0, 0, 1, 1, 1]]).all())
      True
      >>> state, following = episodes.state(), next(episodes)
      >>> episodes.restore(state)
      >>> bool((next(episodes).query.inputs == following.query.inputs).all())
      True

    Reference: Vinyals et al., Matching Networks for One Shot Learning, 2016, arXiv:1606.04080,
    section 2.2.
    """

    def __init__(
        self,
        labels: ArrayLike,
        *,
        ways: int,
        shots: int,
        queries: int,
        tasks: int,
        seed: int,
        rows: Callable[[np.ndarray], Any] | None = None,
    ):
        numbers = {'ways': ways, 'shots': shots, 'queries': queries, 'tasks': tasks}
        self._numbers = {name: whole(name, number) for name, number in numbers.items()}
        seed, own = whole('seed', seed, 0), _labels(labels)
        each = self._numbers['shots'] + self._numbers['queries']
        self._members, self._sizes = _members(own, self._numbers['ways'], each)
        self._first = np.cumsum(self._sizes) - self._sizes
        self._rows, self._seed, self._next = rows, seed, 0
        digest = hashlib.sha256(own.astype(np.int64).tobytes()).hexdigest()
        self._made_of = {'labels': digest, **self._numbers, 'seed': seed, 'drawn': DRAWN}

    def __next__(self) -> Episode:
        ways, shots, queries, tasks = self._numbers.values()
        rng = np.random.default_rng([self._seed, self._next])
        classes = _different(rng, np.full(tasks, len(self._sizes)), ways)
        within = _different(rng, self._sizes[classes], shots + queries)
        drawn = self._members[self._first[classes][..., None] + within]
        self._next += 1
        return Episode(self._shots(drawn[..., :shots]), self._shots(drawn[..., shots:]))

    def _shots(self, drawn: np.ndarray) -> Shots:
        tasks, ways, each = drawn.shape
        labels = np.tile(np.repeat(np.arange(ways, dtype=np.int32), each), (tasks, 1))
        index = drawn.reshape(tasks, ways * each)
        return Shots(index if self._rows is None else self._rows(index), labels)

    def state(self) -> dict[str, Any]:
        """Where the iterator stands, for JSON."""
        return {**self._made_of, 'next': self._next}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where an iterator over the same labels stood.

        Args:
          state: as `state()` gave it.
        """
        for name, own in self._made_of.items():
            if state.get(name) != own:
                raise ValueError(
                    f'the state is of other episodes: {name} was {state.get(name)!r} and is '
                    f'{own!r} now. Go on with the same labels, numbers and seed, or start anew.'
                )
        self._next = whole("the state's next", state.get('next'), 0)


def episode(labels: ArrayLike, support: ArrayLike, query: ArrayLike) -> Episode:
    """One task of chosen examples.

    Args:
      labels: `(n,)` integers, the class of every example.
      support: positions of the examples to adapt on.
      query: positions of the examples to be judged on.

    Returns:
      The task, without an axis of tasks; its labels count the classes of the support in the order
      of their numbers.

    Raises:
      ValueError: a class of the query is not in the support, an example is in both or in one of
        them twice, a position is beyond the data, or there are no examples.

    Example:
      >>> support, query = episode([7, 8, 8, 9, 7], support=[0, 2], query=[4, 1])
      >>> support.labels.tolist(), query.labels.tolist()
      ([0, 1], [0, 1])
    """
    own, chosen = _labels(labels), (np.asarray(support), np.asarray(query))
    for name, index in zip(('support', 'query'), chosen, strict=True):
        _check_positions(name, index, len(own))
    if both := np.intersect1d(*chosen).tolist():
        raise ValueError(
            f'no example may be in support and query: {both[:5]} are. Judge on other examples.'
        )
    classes = np.unique(own[chosen[0]])
    if absent := np.setdiff1d(own[chosen[1]], classes).tolist():
        raise ValueError(
            f'a support must have an example of each class of the query; it has none of {absent}, '
            f'only of {classes.tolist()}. Add one of each.'
        )
    told = lambda index: np.searchsorted(classes, own[index]).astype(np.int32)
    return Episode(*(Shots(index.astype(np.int32), told(index)) for index in chosen))


def _labels(labels: ArrayLike) -> np.ndarray:
    found = np.asarray(labels)
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(
            'labels must be one integer for each example: received '
            f'{found.dtype} of shape {found.shape}. Number them, as by '
            'np.unique(names, return_inverse=True)[1].'
        )
    return found


def _different(rng: np.random.Generator, sizes: np.ndarray, count: int) -> np.ndarray:
    """So many different numbers below each size, all of them and their orders alike likely.

    Floyd's way (Bentley, Programming Pearls, CACM 30(9), 1987), for all sizes side by side: what
    was drawn before is replaced by the largest number that could not be drawn until now. That
    favours places, so the order is drawn too.

    Args:
      rng: to draw from.
      sizes: each at least `count`.
      count: how many.

    Returns:
      `(*sizes.shape, count)`.
    """
    last = sizes[..., None] - count + np.arange(count)
    found = (rng.random(last.shape) * (last + 1)).astype(np.int64)
    for i in range(1, count):
        known = (found[..., :i] == found[..., i, None]).any(-1)
        found[..., i] = np.where(known, last[..., i], found[..., i])
    return rng.permuted(found, axis=-1)


def _members(labels: np.ndarray, ways: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of all examples, class after class, and the size of every class."""
    classes, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(classes) < ways:
        raise ValueError(
            f'a task of ways={ways} needs as many classes: there are {len(classes)}. Ask for '
            'fewer ways.'
        )
    if few := [(int(c), int(n)) for c, n in zip(classes, counts, strict=True) if n < each]:
        raise ValueError(
            f'every class needs at least shots + queries = {each} examples: class {few[0][0]} has '
            f'{few[0][1]} ({len(few)} of {len(classes)} classes have too few). Ask for fewer, or '
            'leave those classes out.'
        )
    return np.argsort(inverse, kind='stable').astype(np.int32), counts


def _check_positions(name: str, index: np.ndarray, n: int) -> None:
    if index.ndim != 1 or not index.size or not np.issubdtype(index.dtype, np.integer):
        raise ValueError(
            f'the {name} must be a list of positions, at least one: received {index.dtype} of '
            f'shape {index.shape}. Choose some.'
        )
    if index.min() < 0 or index.max() >= n:
        raise ValueError(
            f'the {name} must be positions from 0 to {n - 1}: received {index.min()} to '
            f'{index.max()}. Count them from 0.'
        )
    if len(np.unique(index)) < len(index):
        raise ValueError(
            f'the {name} must not have an example twice: received {index.tolist()}. Leave one out.'
        )
