"""Batches of any iterator, as a step takes them that accumulates gradients."""

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import _position

_log = logging.getLogger('peftjax')


class Stacked(Iterator[Any]):
    """Batches, so many at a time on a new first axis: `(parts, ...)`.

    For `train_step(accumulate=parts)`, which makes one update of them. It stands where the batches
    stand, which is between two groups, so that a run goes on exactly; groups pass the ends of
    epochs. Where the batches end with fewer than are needed, those make no group and are left out,
    which is logged.

    Args:
      batches: pytrees of arrays, all of the same shapes. To go on exactly they must say where they
        stand: by `state` and `restore`, or by grain's `get_state` and `set_state`.
      parts: how many make a group.

    Raises:
      ValueError: `parts` is not positive, or (from `next`) the batches of a group differ in shape
        or dtype.
      TypeError: (from `state` and `restore`) the batches do not say where they stand.

    Example:
      >>> import numpy as np, peftjax as pj
      >>> batches = iter([{'x': np.full((2, 3), i)} for i in range(4)])
      >>> groups = pj.Stacked(batches, 2)
      >>> next(groups)['x'].shape, next(groups)['x'][:, 0, 0].tolist()
      ((2, 2, 3), [2, 3])
    """

    def __init__(self, batches: Iterable[Any], parts: int):
        if parts < 1:
            raise ValueError(f'parts must be at least 1: received {parts}')
        self._batches, self._parts = iter(batches), parts

    def __next__(self) -> Any:
        group = list(itertools.islice(self._batches, self._parts))
        if len(group) == self._parts:
            return jax.tree_util.tree_map_with_path(_stack, *group)
        if group:
            _log.warning(
                'the last %d batches make no group of %d: left out', len(group), self._parts
            )
        raise StopIteration

    def state(self) -> Any:
        """Where the batches stand, as they say it."""
        return _position.position(self._batches)

    def restore(self, state: Any) -> None:
        """Goes where batches stood, in groups of the same size or another.

        Args:
          state: as `state()` gave it.
        """
        _position.put(self._batches, state)


def _stack(path: Any, *leaves: Any) -> Any:
    """The leaves of a group as one: on the device where they are there already."""
    kinds = dict.fromkeys((jnp.shape(leaf), _dtype(leaf)) for leaf in leaves)
    if len(kinds) > 1:
        raise ValueError(
            'the batches of a group must have the same shapes and dtypes: received '
            f'{_said(list(kinds))} at batch{jax.tree_util.keystr(path)}. Pad them alike'
        )
    return (jnp if isinstance(leaves[0], jax.Array) else np).stack(leaves)


def _dtype(leaf: Any) -> str:
    return str(leaf.dtype if hasattr(leaf, 'dtype') else np.asarray(leaf).dtype)


def _said(kinds: Sequence[tuple[tuple[int, ...], str]]) -> str:
    return ', '.join(f'{dtype}{list(shape)}' for shape, dtype in kinds)
