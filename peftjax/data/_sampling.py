"""Which examples, in which order: few-shot samples and epochs, reproducible from a seed."""

from collections.abc import Iterator

import numpy as np

from peftjax.data._text import Examples


def shot_indices(examples: Examples, shots: int, seed: int) -> np.ndarray:
    """Draws `shots` examples of every class, without replacement.

    One generator, `np.random.default_rng(seed)`, serves the classes in the order of the names;
    for each it calls `choice(np.flatnonzero(labels == label), shots, replace=False)`.

    Args:
      examples: where to draw from.
      shots: how many of each class, at least 1.
      seed: of the generator.

    Returns:
      `(shots * classes,)` int64 positions in `examples`, class after class.

    Raises:
      ValueError: `shots` is not positive, or a class has fewer examples than that.

    Example:
      >>> examples = Examples(('a', 'b', 'c', 'd'), np.array([0, 1, 0, 1]), ('x', 'y'))
      >>> examples.labels[shot_indices(examples, shots=1, seed=0)]
      array([0, 1], dtype=int32)
    """
    if shots < 1:
        raise ValueError(f'shots must be at least 1: received {shots}.')
    rng = np.random.default_rng(seed)
    drawn = []
    for label, name in enumerate(examples.names):
        members = np.flatnonzero(examples.labels == label)
        if len(members) < shots:
            raise ValueError(
                f'every class needs at least shots={shots} examples: {name!r} has {len(members)}. '
                'Ask for fewer shots or add examples.'
            )
        drawn.append(rng.choice(members, shots, replace=False))
    return np.concatenate(drawn)


def few_shot(examples: Examples, shots: int, seed: int) -> Examples:
    """A small training set: `shots` examples of every class, as `shot_indices` draws them.

    Args:
      examples: where to draw from.
      shots: how many of each class, at least 1.
      seed: of the draw.

    Returns:
      `shots * classes` examples, class after class.

    Raises:
      ValueError: `shots` is not positive, or a class has fewer examples than that.

    Example:
      >>> from peftjax.data import default_messages
      >>> train, _ = default_messages()
      >>> len(few_shot(train, shots=10, seed=0))
      70
    """
    return examples.take(shot_indices(examples, shots, seed))


def epochs(n: int, batch: int, seed: int, epochs: int) -> Iterator[np.ndarray]:
    """Batches of shuffled positions, epoch after epoch.

    One generator, `np.random.default_rng(seed + 1000)`, draws one `permutation(n)` per epoch; it
    is cut into batches, and the last, partial one is kept.

    Args:
      n: how many examples there are.
      batch: how many of them make a batch.
      seed: of the run. The order is drawn apart from the sample of the same seed.
      epochs: how often every example comes.

    Yields:
      `epochs * ceil(n / batch)` arrays of at most `batch` int64 positions.

    Raises:
      ValueError: `n` or `batch` is not positive, or `epochs` is negative.

    Example:
      >>> [len(index) for index in epochs(5, batch=2, seed=0, epochs=2)]
      [2, 2, 1, 2, 2, 1]
    """
    _check_sizes(n, batch)
    if epochs < 0:
        raise ValueError(f'epochs must not be negative: received {epochs}.')
    rng = np.random.default_rng(seed + 1000)
    return (index for _ in range(epochs) for index in _cut(rng.permutation(n), batch))


def in_order(n: int, batch: int) -> Iterator[np.ndarray]:
    """Batches of positions 0 to n - 1, in order, for evaluation.

    Args:
      n: how many examples there are.
      batch: how many of them make a batch.

    Yields:
      `ceil(n / batch)` arrays of at most `batch` int64 positions.

    Raises:
      ValueError: `n` or `batch` is not positive.

    Example:
      >>> [index.tolist() for index in in_order(5, batch=2)]
      [[0, 1], [2, 3], [4]]
    """
    _check_sizes(n, batch)
    return iter(_cut(np.arange(n), batch))


def _cut(order: np.ndarray, batch: int) -> list[np.ndarray]:
    return np.split(order, range(batch, len(order), batch))


def _check_sizes(n: int, batch: int) -> None:
    if n < 1 or batch < 1:
        raise ValueError(f'n and batch must be at least 1: received n={n}, batch={batch}.')
