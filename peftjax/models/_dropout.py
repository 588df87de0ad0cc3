"""Dropout from eight random bits a number, a quarter of what a uniform draw costs on a CPU."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

_LEVELS = 256


def keep(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Draws which numbers dropout keeps; each is kept with probability `1 - rate`.

    A byte is compared with a threshold. As a byte knows only 256 rates, each row draws one of the
    two thresholds around `256 * rate`, so that the probability is exact.

    Args:
      key: typed PRNG key.
      rate: probability of a zero, `0 <= rate <= 1`.
      shape: of the draw, at least one dimension.

    Returns:
      bool array of `shape`, True at what is kept.

    Example:
      >>> float(keep(jax.random.key(0), 0.25, (100, 100)).mean().round(2))
      0.75

    Reference: Srivastava et al., Dropout, 2014, JMLR 15.
    """
    for_bytes, for_rows = jax.random.split(key)
    width = shape[-1]
    words = jax.random.bits(for_bytes, (*shape[:-1], -(-width // 4)), jnp.uint32)
    drawn = lax.bitcast_convert_type(words, jnp.uint8)
    drawn = drawn.reshape(*shape[:-1], -1)[..., :width].astype(jnp.uint16)
    low = math.floor(rate * _LEVELS)
    above = jax.random.bernoulli(for_rows, rate * _LEVELS - low, (*shape[:-1], 1))
    return drawn >= low + above.astype(jnp.uint16)


class Dropout(nn.Module):
    """Sets numbers to zero with probability `rate` and divides the others by `1 - rate`.

    Attributes:
      rate: probability of a zero, `0 <= rate < 1`.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """Applies dropout.

        Args:
          x: any array of at least one dimension.
          deterministic: True leaves `x` as it is.

        Returns:
          Array of the shape and dtype of `x`.
        """
        if deterministic or not self.rate:
            return x
        kept = keep(self.make_rng('dropout'), self.rate, x.shape)
        return jnp.where(kept, x / jnp.asarray(1 - self.rate, x.dtype), jnp.zeros((), x.dtype))
