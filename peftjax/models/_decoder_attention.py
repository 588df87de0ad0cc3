"""Self-attention of a decoder: projections, rotation, cache, and the kernel of the backend."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from peftjax.models._attention import attention, plain_attention
from peftjax.models._cache import Store
from peftjax.models._causal import causal_attention
from peftjax.models._compute import Compute
from peftjax.models._decoder_config import Attention, DecoderConfig
from peftjax.models._kernel import kernel_attention, serves
from peftjax.models._layers import RmsNorm, linear
from peftjax.models._rope import rotate
from peftjax.models._sight import Sight, causal_mask

Array = jax.Array


class SelfAttention(nn.Module):
    """Causal self-attention.

    Attributes:
      config: shape and names.
      compute: dtypes and the form of attention.
    """

    config: DecoderConfig
    compute: Compute

    @nn.compact
    def __call__(
        self, x: Array, sight: Sight, store: Store | None, layer: Array
    ) -> tuple[Array, Store | None]:
        """Mixes tokens.

        Args:
          x: `(batch, tokens, hidden_size)`.
          sight: of this kind of layer.
          store: keys and values of a cache, or None.
          layer: int scalar, index of the layer.

        Returns:
          Array of the shape of `x`, and the store with the tokens' keys and values.
        """
        config, compute = self.config, self.compute
        query, key, value = self._project(x)
        if sight.turn is not None:
            query, key = rotate(query, sight.turn), rotate(key, sight.turn)
        query = checkpoint_name(query, 'query')
        key = checkpoint_name(key, 'key')
        value = checkpoint_name(value, 'value')
        if store is not None:
            store = store.write(layer, key, value)
            key, value = (kept.astype(x.dtype) for kept in store.read(layer))
        mixed = attend(query, key, value, sight, config.attention, compute)
        mixed = checkpoint_name(mixed.reshape(*x.shape[:-1], -1), 'context')
        bias = config.attention.output_bias
        output = linear(
            config.hidden_size, config.initializer_range, compute, config.names.output, bias=bias
        )
        return output(mixed), store

    def _project(self, x: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values `(batch, tokens, heads, head_dim)`."""
        config, names = self.config, self.config.names
        shape = config.attention
        heads = {names.query: shape.heads, names.key: shape.kv_heads, names.value: shape.kv_heads}
        widths = [count * shape.head_dim for count in heads.values()]

        def product(width: int, name: str) -> Array:
            deviation = config.initializer_range
            return linear(width, deviation, self.compute, name, bias=shape.bias)(x)

        if names.query_key_value is None:
            parts = [product(width, name) for width, name in zip(widths, heads, strict=True)]
        else:
            whole = product(sum(widths), names.query_key_value)
            parts = jnp.split(whole, (widths[0], widths[0] + widths[1]), axis=-1)
        query, key, value = (
            part.reshape(*x.shape[:-1], count, shape.head_dim)
            for part, count in zip(parts, heads.values(), strict=True)
        )
        norm = lambda name: RmsNorm(
            config.norm.epsilon, self.compute, config.norm.offset, name=name
        )
        if names.query_norm is not None:
            query = norm(names.query_norm)(query)
        if names.key_norm is not None:
            key = norm(names.key_norm)(key)
        return query, key, value


def attend(
    query: Array, key: Array, value: Array, sight: Sight, shape: Attention, compute: Compute
) -> Array:
    """Attention by the kernel that fits.

    On an NVIDIA GPU in half precision that is cuDNN's, which holds no scores, under a mask too.
    Elsewhere, and with a soft cap, for which it has none, all scores of a layer are held.

    Args:
      query: `(batch, tokens, heads, head_dim)`.
      key: `(batch, keys, kv_heads, head_dim)`.
      value: as `key`.
      sight: which keys a token sees.
      shape: scale and soft cap.
      compute: form of attention; `'plain'` is never cuDNN's.

    Returns:
      Array of the shape of `query`.
    """
    if serves(query, key, sight, shape, compute):
        return kernel_attention(query, key, value, sight, shape.scale)
    mask = causal_mask(query.shape[1], sight.window) if sight.mask is None else sight.mask
    form = functools.partial(attention, scale=shape.scale)
    if shape.soft_cap is not None or not compute.fused:
        form = functools.partial(plain_attention, scale=shape.scale, soft_cap=shape.soft_cap)
    if sight.causal:
        return causal_attention(form, query, key, value, mask, sight.window)
    return form(query, key, value, mask)
