"""The leaves of the models: norms, linear and embedding layers with explicit dtypes."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from peftjax.models._compute import Compute

_wide_product = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)


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


class RmsNorm(nn.Module):
    """Division by the root of the mean square over the last axis, in float32; leaf `scale`.

    Attributes:
      epsilon: added to the mean square.
      compute: dtypes.
      offset: added to the stored scale.

    Reference: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467.
    """

    epsilon: float
    compute: Compute
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes.

        Args:
          x: `(..., width)`.

        Returns:
          Array of the shape of `x`, of `compute.dtype`.
        """
        shape = x.shape[-1:]
        fresh = nn.initializers.constant(1 - self.offset)
        scale = self.param('scale', fresh, shape, self.compute.param_dtype)
        scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + shape)
        scale = scale + self.offset if self.offset else scale
        x = x.astype(jnp.float32)
        normal = x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + self.epsilon)
        return (normal * scale).astype(self.compute.dtype)


class Embedding(nn.Module):
    """A table of vectors, read by gather; leaf `embedding`. Ids outside of it give NaN.

    Attributes:
      rows: number of vectors.
      width: of a vector.
      deviation: standard deviation of fresh vectors.
      compute: dtypes.
    """

    rows: int
    width: int
    deviation: float
    compute: Compute

    def setup(self):
        """The table, which a lookup and a tied head share."""
        draw = nn.initializers.normal(self.deviation)
        shape = (self.rows, self.width)
        self.embedding = self.param('embedding', draw, shape, self.compute.param_dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Looks vectors up.

        Args:
          ids: integers of any shape.

        Returns:
          `(*ids.shape, width)` of `compute.dtype`.
        """
        # A silently clamped id would read as a plausible vector; NaN does not go unnoticed.
        rows = self.embedding.at[ids].get(
            mode='fill', fill_value=jnp.nan, wrap_negative_indices=False
        )
        return rows.astype(self.compute.dtype)

    def scores(self, x: jax.Array) -> jax.Array:
        """Inner products with all vectors: a tied head.

        Args:
          x: `(..., width)` of `compute.dtype`.

        Returns:
          float32 `(..., rows)`.
        """
        table = self.embedding.astype(self.compute.dtype)
        return _wide_product(x, table, (((x.ndim - 1,), (1,)), ((), ())))


def linear(
    width: int,
    deviation: float,
    compute: Compute,
    name: str,
    *,
    bias: bool = True,
    wide: bool = False,
) -> nn.Dense:
    """A linear layer `x @ kernel + bias` as Hugging Face initializes it.

    Args:
      width: of the output.
      deviation: standard deviation of fresh weights.
      compute: dtypes.
      name: of the module.
      bias: whether it has one.
      wide: whether the output is float32, whatever is multiplied.

    Returns:
      A linen layer with a 2-D kernel.
    """
    return nn.Dense(
        width,
        use_bias=bias,
        dtype=compute.dtype,
        param_dtype=compute.param_dtype,
        kernel_init=nn.initializers.normal(deviation),
        dot_general=_wide_product if wide else None,
        name=name,
    )
