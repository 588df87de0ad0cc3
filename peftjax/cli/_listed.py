"""Batches that are all there before the first step, and can be taken up again at any one."""

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax


class Listed(Iterator[dict[str, Any]]):
    """The batches of a whole run, in order.

    Args:
      batches: of arrays.

    Attributes:
      all: the batches, seen or not.

    Raises:
      ValueError: from `restore`, a state of other batches.
    """

    def __init__(self, batches: Sequence[dict[str, Any]]):
        self.all, self._seen = batches, 0

    def __len__(self) -> int:
        """The number of all batches."""
        return len(self.all)

    def __next__(self) -> dict[str, Any]:
        if self._seen == len(self.all):
            raise StopIteration
        self._seen += 1
        return self.all[self._seen - 1]

    def state(self) -> dict[str, Any]:
        """How many were seen of which batches, for JSON."""
        return {'batches': self._digest, 'seen': self._seen}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where an iterator over the same batches stood."""
        if state.get('batches') != self._digest:
            raise ValueError(
                f'the state is of other batches: they were {state.get("batches")!r} and are '
                f'{self._digest!r} now. Go on with the same examples, or start anew'
            )
        self._seen = state['seen']

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(self.all):
            digest.update(f'{leaf.dtype}{leaf.shape}'.encode() + leaf.tobytes())
        return digest.hexdigest()
