"""Batches of rows in a reproducible order that can be taken up again at any one."""

from collections.abc import Iterator, Mapping
from typing import Any

from peftjax._counts import whole
from peftjax.data._rows import LanguageBatch, Rows


class Batches(Iterator[LanguageBatch]):
    """Batches of one static shape, epoch after epoch.

    Every epoch has an order of its own, drawn from the seed; its last batch is filled up with
    padding. `state()` says, between any two batches, where the iterator stands; `restore` takes it
    up there, in this process or another.

    Args:
      rows: what to cut into batches.
      size: rows of a batch.
      seed: of the order; `None` leaves the rows as they are, for evaluation.
      epochs: how often every row comes.

    Raises:
      ValueError: `size` or `epochs` is not positive, or the seed negative; from `restore`, a state
        of other rows, another size or another seed.
      TypeError: one of them is no integer.

    Example:
      >>> import numpy as np
      >>> from peftjax.data import Sample, one_per_row
      >>> samples = [Sample(np.full(2, i), np.ones(2, bool)) for i in range(5)]
      >>> batches = Batches(one_per_row(samples, 2), 2, seed=0, epochs=3)
      >>> len(batches), next(batches).input_ids.shape
      (9, (2, 2))
      >>> state = batches.state()
      >>> rest = [batch.input_ids.tolist() for batch in batches]
      >>> batches.restore(state)
      >>> rest == [batch.input_ids.tolist() for batch in batches]
      True
    """

    def __init__(self, rows: Rows, size: int, *, seed: int | None, epochs: int = 1):
        size, epochs = whole('size', size), whole('epochs', epochs)
        seed = None if seed is None else whole('seed', seed, 0)
        import grain

        order = grain.MapDataset.range(len(rows))
        order = order if seed is None else order.shuffle(seed=seed)
        filled = order.batch(size, batch_fn=lambda index: rows.batch(index, size))
        in_memory = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._length = len(filled) * epochs
        self._steps = iter(filled.repeat(epochs).to_iter_dataset(in_memory))
        self._made_of = {'rows': rows.fingerprint(), 'size': size, 'seed': seed}

    def __len__(self) -> int:
        """The number of batches in all epochs."""
        return self._length

    def __next__(self) -> LanguageBatch:
        return next(self._steps)

    def state(self) -> dict[str, Any]:
        """Where the iterator stands, for JSON."""
        return {**self._made_of, 'order': self._steps.get_state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where an iterator over the same rows stood.

        Args:
          state: as `state()` gave it; the number of epochs may be another now.
        """
        for name, own in self._made_of.items():
            if state.get(name) != own:
                raise ValueError(
                    f'the state is of another stream: {name} was {state.get(name)!r} and is '
                    f'{own!r} now. Go on with the same data, size and seed, or start anew.'
                )
        self._steps.set_state(dict(state['order']))
