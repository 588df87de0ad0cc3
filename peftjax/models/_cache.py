"""Keys and values of the tokens that were read so far."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from peftjax.models._decoder_config import DecoderConfig


class Cache(NamedTuple):
    """A preallocated store of keys and values; `Decoder.init_cache` makes an empty one.

    All rows of a batch fill the same slots; slots of padding are marked and never looked at, so
    that prompts may be padded on either side. Its shapes never change: one program serves every
    decoding step.

    Attributes:
      key: `(layers, batch, slots, kv_heads, head_dim)`, after norm and rotation.
      value: as `key`.
      mask: bool `(batch, slots)`, True where a real token was read.
      index: int32 scalar, number of slots filled.
      length: int32 `(batch,)`, where a rotation goes by it (`Rope`): of the text that a row may
        become; 0 until it is known.
    """

    key: jax.Array
    value: jax.Array
    mask: jax.Array
    index: jax.Array
    length: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class InitCache:
    """Makes empty caches for a model: `init_cache(batch, slots)`.

    Attributes:
      config: of the model.
      dtype: of its computation.
    """

    config: DecoderConfig
    dtype: jax.typing.DTypeLike

    @property
    def positions(self) -> int | None:
        """How many positions the model has learned; None where it needs to learn none."""
        return self.config.positions or None

    def __call__(self, batch: int, slots: int, dtype: jax.typing.DTypeLike | None = None) -> Cache:
        """An empty cache.

        Args:
          batch: number of rows.
          slots: most tokens that will be read, padding and virtual tokens included. `dynamic` and
            `longrope` rotations take a text to become as long as they allow (`Rope`).
          dtype: of keys and values; None is that of the computation.

        Returns:
          Zeros.
        """
        config = self.config
        kept = (config.attention.kv_heads, config.attention.head_dim)
        shape = (config.num_hidden_layers, batch, slots, *kept)
        dtype = self.dtype if dtype is None else dtype
        by_length = any(kind.by_length for kind in config.kinds)
        return Cache(
            key=jnp.zeros(shape, dtype),
            value=jnp.zeros(shape, dtype),
            mask=jnp.zeros((batch, slots), jnp.bool_),
            index=jnp.zeros((), jnp.int32),
            length=jnp.zeros(batch, jnp.int32) if by_length else None,
        )


class Store(NamedTuple):
    """What of a cache goes from layer to layer, each writing its own.

    Attributes:
      key: as in `Cache`.
      value: as in `Cache`.
      slot: int32 scalar, the first slot to fill.
    """

    key: jax.Array
    value: jax.Array
    slot: jax.Array

    def write(self, layer: jax.Array, key: jax.Array, value: jax.Array) -> 'Store':
        """Writes the keys and values of new tokens.

        Args:
          layer: int scalar, which layer's they are.
          key: `(batch, tokens, kv_heads, head_dim)`.
          value: as `key`.

        Returns:
          The store with them.
        """
        zero = jnp.zeros((), jnp.int32)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            start = (layer, zero, self.slot, zero, zero)
            return lax.dynamic_update_slice(old, new.astype(old.dtype)[None], start)

        return Store(put(self.key, key), put(self.value, value), self.slot)

    def read(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of one layer, `(batch, slots, kv_heads, head_dim)`.

        Args:
          layer: int scalar.

        Returns:
          Both, of all slots.
        """
        of = lambda layers: lax.dynamic_index_in_dim(layers, layer, keepdims=False)
        return of(self.key), of(self.value)
