"""Several tensors become one: weighted sums, pruned sums, sums of those whose sign wins."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from peftjax._types import Array

SIGNS = ('total', 'frequency')


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How the tensors of one module become one.

    Attributes:
      prune: `magnitude` keeps the largest entries of each tensor, `random` draws which to keep and
        scales them up; else all are kept.
      density: the part of the entries that is kept.
      elect: the sign of an entry is that of the sum (`total`), or that which more tensors have
        (`frequency`); those of the other sign are left out of its mean. Else all are summed.
    """

    prune: str = ''
    density: float = 1.0
    elect: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(
                f'density is the part of the entries that is kept, in (0, 1]; got {self.density!r}'
            )
        if self.elect is not None and self.elect not in SIGNS:
            raise ValueError(f'elect must be one of {SIGNS}; got {self.elect!r}')

    def __call__(self, tensors: Sequence[Array], weights: Array, key: Array | None) -> Array:
        """One tensor of several.

        Args:
          tensors: each `(layers, ...)`, one module after the other.
          weights: `(len(tensors),)`.
          key: for `random`.
        """
        stacked = jnp.stack(tensors, axis=1)
        if self.prune != 'random' or key is None:
            return jax.vmap(lambda own: self._one(own, weights, None))(stacked)
        keys = jax.random.split(key, len(stacked))
        return jax.vmap(lambda own, key: self._one(own, weights, key))(stacked, keys)

    def _one(self, tensors: Array, weights: Array, key: Array | None) -> Array:
        if self.density < 1:
            tensors = self._pruned(tensors, key)
        weighted = tensors * weights.reshape(-1, *(1,) * (tensors.ndim - 1))
        if self.elect is None:
            return weighted.sum(axis=0)
        wins = _wins(tensors, self.elect)
        count = wins.sum(axis=0, dtype=weighted.dtype)
        return jnp.where(wins, weighted, 0).sum(axis=0) / jnp.maximum(count, 1)

    def _pruned(self, tensors: Array, key: Array | None) -> Array:
        if key is not None:
            kept = jax.random.bernoulli(key, self.density, tensors.shape)
            return jnp.where(kept, tensors / self.density, 0)
        flat = tensors.reshape(len(tensors), -1)
        most = lax.top_k(jnp.abs(flat), int(self.density * flat.shape[1]))[1]
        kept = jax.vmap(lambda where: jnp.zeros(flat.shape[1], bool).at[where].set(True))(most)
        return jnp.where(kept, flat, 0).reshape(tensors.shape)


def _wins(tensors: Array, elect: str) -> Array:
    """Where an entry has the sign that its place was given; a sum of zero counts as positive."""
    sign = jnp.sign(tensors)
    votes = (tensors if elect == 'total' else sign).sum(axis=0)
    return sign == jnp.where(votes >= 0, 1, -1).astype(sign.dtype)


def truncated(a: Array, b: Array, rank: int) -> tuple[Array, Array]:
    """The best product of lower rank, without the whole one: `(…, in, rank)`, `(…, rank, out)`."""
    q_in, r_in = jnp.linalg.qr(a)
    q_out, r_out = jnp.linalg.qr(b.swapaxes(-1, -2))
    first, last = split(r_in @ r_out.swapaxes(-1, -2), rank)
    return q_in @ first, last @ q_out.swapaxes(-1, -2)


def split(update: Array, rank: int) -> tuple[Array, Array]:
    """The best product of some rank: orthonormal `(…, in, rank)` and the rest `(…, rank, out)`."""
    u, s, vh = jnp.linalg.svd(update, full_matrices=False)
    return u[..., :rank], s[..., :rank, None] * vh[..., :rank, :]
