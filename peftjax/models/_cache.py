"""Keys and values of the tokens that were read so far."""

from typing import NamedTuple

import jax


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
    """

    key: jax.Array
    value: jax.Array
    mask: jax.Array
    index: jax.Array
