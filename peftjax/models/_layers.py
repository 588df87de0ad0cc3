"""The leaves of the encoder: layer norm, linear and embedding layers with explicit dtypes."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from peftjax.models._config import Compute, EncoderConfig


class LayerNorm(nn.Module):
    """Layer norm over the last axis, computed in float32; leaves `scale` and `bias`.

    Attributes:
      epsilon: added to the variance.
      compute: dtypes.
    """

    epsilon: float
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes.

        Args:
          x: `(..., width)`.

        Returns:
          Array of the shape of `x`, of `compute.dtype`.
        """
        shape, param_dtype = x.shape[-1:], self.compute.param_dtype
        scale = self.param('scale', nn.initializers.ones, shape, param_dtype)
        bias = self.param('bias', nn.initializers.zeros, shape, param_dtype)
        x = x.astype(jnp.float32)
        centered = x - x.mean(axis=-1, keepdims=True)
        variance = (centered * centered).mean(axis=-1, keepdims=True)
        normal = centered * jax.lax.rsqrt(variance + self.epsilon)
        last = (1,) * (x.ndim - 1) + shape
        y = normal * scale.astype(jnp.float32).reshape(last)
        return (y + bias.astype(jnp.float32).reshape(last)).astype(self.compute.dtype)


class Embedding(nn.Module):
    """A table of vectors, read by gather; leaf `embedding`. Ids outside of it give NaN.

    Attributes:
      rows: number of vectors.
      config: width and standard deviation of fresh vectors.
      compute: dtypes.
    """

    rows: int
    config: EncoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Looks vectors up.

        Args:
          ids: integers of any shape.

        Returns:
          `(*ids.shape, hidden_size)` of `compute.dtype`.
        """
        draw = nn.initializers.normal(self.config.initializer_range)
        shape = (self.rows, self.config.hidden_size)
        table = self.param('embedding', draw, shape, self.compute.param_dtype)
        # A silently clamped id would read as a plausible vector; NaN does not go unnoticed.
        rows = table.at[ids].get(mode='fill', fill_value=jnp.nan, wrap_negative_indices=False)
        return rows.astype(self.compute.dtype)


def linear(width: int, config: EncoderConfig, compute: Compute, name: str) -> nn.Dense:
    """A linear layer `x @ kernel + bias` as Hugging Face initializes it.

    Args:
      width: of the output.
      config: standard deviation of fresh weights.
      compute: dtypes.
      name: of the module.

    Returns:
      A linen layer with a 2-D kernel.
    """
    return nn.Dense(
        width,
        dtype=compute.dtype,
        param_dtype=compute.param_dtype,
        kernel_init=nn.initializers.normal(config.initializer_range),
        name=name,
    )
