"""Causal attention in blocks of tokens: keys that no token of a block sees are not multiplied."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array

_SMALLEST, _MOST = 128, 8  # Smaller blocks, or more of them, cost more in small products.


def causal_attention(
    form: Callable[[Array, Array, Array, Array], Array],
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    window: int | None = None,
) -> Array:
    """Attention where tokens are keys and none sees a later one.

    Half of all pairs are of a token and a later key. With `n` blocks, `(n + 1) / (2 n)` of the
    pairs are computed, and as much of the exponentials is kept for a gradient.

    Args:
      form: `form(query, key, value, mask)`, attention over all keys that it is given.
      query: `(batch, tokens, heads, head_dim)`.
      key: `(batch, tokens, kv_heads, head_dim)`.
      value: as `key`.
      mask: bool `(batch or 1, tokens, tokens)`, False at all later keys.
      window: a number of keys, itself included, that no token sees beyond. None is no such bound.

    Returns:
      Array of the shape of `query`.

    Example:
      >>> from peftjax.models._attention import attention
      >>> x = jax.random.normal(jax.random.key(0), (1, 256, 2, 8))
      >>> mask = jnp.tril(jnp.ones((1, 256, 256), bool))
      >>> whole, blocks = attention(x, x, x, mask), causal_attention(attention, x, x, x, mask)
      >>> bool(jnp.allclose(whole, blocks, atol=1e-6))
      True
    """
    tokens = query.shape[1]
    count = max(1, min(tokens // _SMALLEST, _MOST))
    edges = [tokens * i // count for i in range(count + 1)]

    def block(start: int, stop: int) -> Array:
        first = 0 if window is None else max(0, start + 1 - window)
        seen = slice(first, stop)
        return form(query[:, start:stop], key[:, seen], value[:, seen], mask[:, start:stop, seen])

    if count == 1:
        return form(query, key, value, mask)
    return jnp.concatenate([block(*pair) for pair in zip(edges, edges[1:], strict=False)], axis=1)
