"""Keys and values of the tokens that were read so far."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


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
