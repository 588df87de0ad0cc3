"""Activations of the feed-forward layer, by their Hugging Face names."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax


def _gelu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x * cdf(x)` and its derivative `cdf(x) + x * pdf(x)`, of the standard normal."""
    cdf = 0.5 * (1 + lax.erf(x * math.sqrt(0.5)))
    pdf = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return x * cdf, cdf + x * pdf


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, `x * P(N(0, 1) <= x)`, computed in float32.

    The derivative is formed beside the value, so that a gradient keeps one array instead of the
    several that automatic differentiation of the formula keeps.

    Args:
      x: any shape, any float dtype.

    Returns:
      Array of the shape and dtype of `x`.

    Example:
      >>> round(float(gelu(jnp.float32(1.0))), 4)
      0.8413

    Reference: Hendrycks and Gimpel, Gaussian Error Linear Units, 2016, arXiv:1606.08415.
    """
    return _gelu_and_slope(x.astype(jnp.float32))[0].astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    value, slope = _gelu_and_slope(x.astype(jnp.float32))
    return value.astype(x.dtype), slope.astype(x.dtype) * dx


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


_tanh_gelu = functools.partial(jax.nn.gelu, approximate=True)

ACTIVATIONS = {
    'gelu': gelu,
    'gelu_python': gelu,
    'gelu_new': _tanh_gelu,
    'gelu_fast': _tanh_gelu,
    'gelu_pytorch_tanh': _tanh_gelu,
    'quick_gelu': _quick_gelu,
    'relu': jax.nn.relu,
    'silu': jax.nn.silu,
    'swish': jax.nn.silu,
    'tanh': jnp.tanh,
}
