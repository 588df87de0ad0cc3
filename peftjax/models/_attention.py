"""The attention core: from query, key and value to the weighted sum of values."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def plain_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    drop: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Bidirectional scaled dot-product attention, as the formula reads.

    Args:
      query: `(batch, tokens, heads, head_dim)`.
      key: `(batch, keys, heads, head_dim)`.
      value: as `key`.
      mask: bool `(batch, keys)`, True at the keys to attend to. None attends to all.
      drop: applied to the attention weights `(batch, heads, tokens, keys)`.

    Returns:
      `(batch, tokens, heads, head_dim)` of the dtype of `value`. Softmax is float32.

    Example:
      >>> x = jnp.ones((1, 3, 2, 4))
      >>> plain_attention(x, x, x).shape
      (1, 3, 2, 4)
    """
    scale = query.shape[-1] ** -0.5
    scores = jnp.einsum('bqhd,bkhd->bhqk', query, key, preferred_element_type=jnp.float32) * scale
    if mask is not None:
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    if drop is not None:
        weights = drop(weights)
    return jnp.einsum('bhqk,bkhd->bqhd', weights, value)


attention = plain_attention
