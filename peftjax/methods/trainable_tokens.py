"""Trainable tokens: a few rows of an embedding trained, as Hugging Face PEFT does (2025)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp

from peftjax._factor import along
from peftjax._lowrank import LowRank, pair_axes
from peftjax._method import Method, float32
from peftjax._sites import Site, Sites
from peftjax._standin import StandIn
from peftjax._table import rows_of, with_rows
from peftjax._types import Array, Path, Phi


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainableTokens(Method):
    """Trains the embeddings of a few tokens, such as new ones; phi holds their new rows.

    The table is not copied: a lookup gets the difference of the rows where one of the tokens is,
    and so do the logits of a head that shares the table.

    Attributes:
      target: regex, or several, searched in the paths of embedding tables.
      ids: the tokens, different ones.
      dtype: of phi.

    Shapes: `rows: (*stack, tokens, *out)`, in the order of `ids`. At init they are the rows of the
    table: the model equals the base bit for bit.

    Raises:
      ValueError: `ids` are none, negative or twice; from `attach`: a target finds no embedding, or
        an id lies outside the table.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params = {'embed_tokens': {'embedding': jnp.ones((10, 4))}}
      >>> peft = pj.attach(
      ...     pj.TrainableTokens(target='embed_tokens', ids=(8, 9)),
      ...     lambda p, ids: p['embed_tokens']['embedding'][ids], params, jnp.zeros(3, jnp.int32))
      >>> jax.tree.map(jnp.shape, peft.init(jax.random.key(0), params))
      {'embed_tokens/embedding': {'rows': (2, 4)}}
    """

    ids: tuple[int, ...]
    dtype: str = 'float32'

    kinds: ClassVar[tuple[str, ...]] = ('embedding',)
    seam: ClassVar[str] = 'weight'
    identity: ClassVar[str] = 'exact'
    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        ids = self.ids
        plain = isinstance(ids, tuple) and all(type(i) is int and i >= 0 for i in ids)
        if not plain or not ids or len(set(ids)) < len(ids):
            raise ValueError(f'TrainableTokens: ids must be different token ids; got {ids!r:.200}')

    def select(self, sites: Sites) -> tuple[Site, ...]:
        """See `Method`."""
        chosen = super().select(sites)
        for site in chosen:
            rows = site.fan_in
            if wrong := [i for i in self.ids if i >= rows]:
                raise ValueError(
                    f'TrainableTokens: ids must be below {rows}, the rows of {site.path!r}; got '
                    f'{wrong[:5]}. Resize the table first'
                )
        return chosen

    def init(self, key: Array, sites: tuple[Site, ...], params: Mapping[Path, Any]) -> Phi:
        """See `Method`; the rows are read from the table."""
        del key
        return {
            site.path: {'rows': self._rows(site, params[site.path]).astype(self.dtype)}
            for site in sites
        }

    def axes(self, site: Site) -> Mapping[str, tuple[int | None, ...]]:
        """See `Method`."""
        return {'rows': (*site.stack, None, *site.outputs)}

    def bind(self, site: Site, w: Any, phi: Phi, key: Array | None) -> StandIn:
        """See `Method`: a product of rank `len(ids)`; one factor says which row is whose."""
        del key
        table = w.dense() if isinstance(w, StandIn) else w
        change = float32(phi['rows']) - self._rows(site, table)
        which = jnp.asarray(self.ids)[None] == jnp.arange(site.fan_in)[:, None]
        which = jnp.broadcast_to(
            which.astype(change.dtype), (*site.sizes(site.stack), *which.shape)
        )
        pair = along({'a': which, 'b': change}, pair_axes(site), site.rank)
        return StandIn.over(site, w, *pair, LowRank(1.0))

    def merge(self, site: Site, leaves: Mapping[Path, Array], phi: Phi) -> Mapping[Path, Array]:
        """See `Method`: the rows themselves."""
        table = _rows_first(site, leaves[site.path])
        rows = jnp.moveaxis(float32(phi['rows']), len(site.stack), 0).astype(table.dtype)
        merged = with_rows(table, self.ids, rows)
        order = (*site.inputs, *site.stack, *site.outputs)
        return {site.path: jnp.moveaxis(merged, range(site.rank), order)}

    def _rows(self, site: Site, table: Array) -> Array:
        """The rows of the table: `(*stack, tokens, *out)`."""
        rows = rows_of(_rows_first(site, jnp.asarray(table)), self.ids)
        return jnp.moveaxis(float32(rows), 0, len(site.stack))


def _rows_first(site: Site, table: Array) -> Array:
    return jnp.transpose(table, (*site.inputs, *site.stack, *site.outputs))
