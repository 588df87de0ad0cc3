"""Rows of a table of embeddings, wherever it lies."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from peftjax._types import Array


def rows_of(table: Array, ids: Sequence[int] | Array) -> Array:
    """Some rows of a table.

    Args:
      table: `(rows, ...)`; on explicit axes its rows may be split.
      ids: `(n,)` integers, which rows.

    Returns:
      `(n, ...)`, its rows whole on every device, all else where it was.

    Example:
      >>> rows_of(jnp.arange(4), (2, 0))
      Array([2, 0], dtype=int32)
    """
    where = jax.typeof(table).sharding
    spec = PartitionSpec(None, *where.spec[1:])
    # a table on no explicit axes leaves XLA the choice
    to = NamedSharding(where.mesh, spec) if any(where.spec) else None
    return table.at[jnp.asarray(ids)].get(out_sharding=to)


def with_rows(table: Array, ids: Sequence[int] | Array, rows: Array) -> Array:
    """A table with other rows in some places.

    Args:
      table: `(rows, ...)`; on explicit axes its rows may be split.
      ids: `(n,)` integers, which rows.
      rows: `(n, ...)`.

    Returns:
      As `table`, and where it lies.

    Example:
      >>> with_rows(jnp.arange(4), (2, 0), jnp.array([7, 8]))
      Array([8, 1, 7, 3], dtype=int32)
    """
    where = jax.typeof(table).sharding
    return table.at[jnp.asarray(ids)].set(rows, out_sharding=where if any(where.spec) else None)
