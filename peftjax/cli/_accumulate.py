"""A step's batch in parts, for less memory."""

import argparse
from typing import Any

import jax


def check(options: argparse.Namespace) -> None:
    """Refuses parts of unequal size.

    Args:
      options: with `batch` and `accumulate`.

    Raises:
      ValueError: the one is no multiple of the other.
    """
    if options.batch % options.accumulate:
        raise ValueError(
            f'--accumulate {options.accumulate} must divide --batch {options.batch}: the rows of '
            'one step are cut into so many parts'
        )


def cut(batch: Any, parts: int) -> Any:
    """A batch as a step takes it that sums gradients over parts: `(parts, rows, …)`."""
    if parts == 1:
        return batch
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
