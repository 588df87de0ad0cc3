"""How the next token is drawn from the logits of a language model."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from peftjax._types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from the logits.

    Attributes:
      temperature: logits are divided by it; above 0, where it comes to the likeliest token.
      top_k: only so many of the likeliest tokens may be drawn; None is all.
      top_p: only the likeliest tokens that together have this probability may be drawn, at least
        one; 1 is all. Applied after `top_k`. Of equally likely tokens, both keep the first.

    Raises:
      ValueError: a value out of its range.

    Example:
      >>> import peftjax as pj
      >>> pj.Sampling(temperature=0.7, top_p=0.9)
      Sampling(temperature=0.7, top_k=None, top_p=0.9)

    Reference: Fan et al. 2018, arXiv:1805.04833 (top-k); Holtzman et al. 2019, arXiv:1904.09751
    (top-p).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f'Sampling: temperature must be above 0; got {self.temperature!r}. The likeliest '
                'token without drawing is sampling=None'
            )
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ValueError(f'Sampling: top_k must be None or a number from 1; got {self.top_k!r}')
        if not 0 < self.top_p <= 1:
            raise ValueError(f'Sampling: top_p must be above 0, at most 1; got {self.top_p!r}')

    def draw(self, key: Array, logits: Array) -> Array:
        """Draws tokens.

        Args:
          key: typed PRNG key.
          logits: `(batch, vocabulary)`.

        Returns:
          int32 `(batch,)`.
        """
        logits = logits.astype(jnp.float32)
        # The likeliest at 0: the quotients of the others may overflow, and are then never drawn.
        logits = (logits - logits.max(axis=-1, keepdims=True)) / self._divisor
        if self.top_k is not None or self.top_p < 1:
            logits = self._kept(logits)
        return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)

    @property
    def _divisor(self) -> float:
        """The temperature, within what float32 has an inverse of: XLA may multiply with that."""
        least = float(jnp.finfo(jnp.float32).tiny)
        return min(max(self.temperature, least), 1 / least)

    def _kept(self, logits: Array) -> Array:
        """The logits of what may be drawn, as many as there are to be where some are equal."""
        count = logits.shape[-1]
        falling, tokens = lax.top_k(logits, min(self.top_k or count, count))
        if self.top_p < 1:
            odds = jax.nn.softmax(falling, axis=-1)
            before = jnp.cumsum(odds, axis=-1) - odds
            falling = jnp.where(before < self.top_p, falling, -jnp.inf)
        none = jnp.full_like(logits, -jnp.inf)
        return jnp.put_along_axis(none, tokens, falling, axis=-1, inplace=False)
