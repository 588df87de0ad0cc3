"""Rotary position embedding, with the ways in which checkpoints stretch it to longer texts."""

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

Scaling = Literal['default', 'linear', 'dynamic', 'llama3', 'yarn', 'longrope']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """How queries and keys are rotated by their positions.

    `dynamic` and `longrope` go by the length of the text, one more than the last position of its
    real tokens: of each row for itself, of each segment where rows are packed. A text that is read
    through a cache goes by the length that it may come to, which the call that first reads one of
    its tokens beyond position 0 decides: the last position then, and all slots that are left.

    Attributes:
      dim: features of a head that are rotated, the first ones; even.
      theta: base of the wavelengths `2 pi theta^(2i / dim)`.
      scaling: how the frequencies differ from `theta^(-2i / dim)`.
      factor: by how much texts are longer than those of pretraining (all but `longrope`).
      original: longest text of pretraining (all but `linear`).
      low: `llama3`: wavelengths above `original / low` are stretched in full; `yarn`: rotations
        within `original` below which a frequency is.
      high: the same, for those that are not stretched at all.
      whole: `yarn`: whether the bounds of the ramp between the two are whole numbers.
      short: `longrope`: what each frequency is divided by, in texts of up to `original` tokens.
      long: `longrope`: the same, in longer ones.
      magnitude: cosines and sines are multiplied with it.

    Raises:
      ValueError: an unknown scaling, an odd `dim`, or `longrope` without `dim / 2` factors.

    Example:
      >>> Rope(dim=4, theta=100.0).frequencies(None)
      Array([[[1. , 0.1]]], dtype=float32)

    Reference: Su et al., RoFormer, 2021, arXiv:2104.09864, section 3.2; `dynamic` and `yarn`: Peng
    et al., YaRN, 2023, arXiv:2309.00071; `longrope`: Ding et al., LongRoPE, 2024,
    arXiv:2402.13753; `llama3`: The Llama 3 Herd of Models, 2024, arXiv:2407.21783.
    """

    dim: int
    theta: float
    scaling: Scaling = 'default'
    factor: float = 1.0
    original: int = 0
    low: float = 1.0
    high: float = 1.0
    whole: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    magnitude: float = 1.0

    def __post_init__(self):
        if self.scaling not in get_args(Scaling):
            raise ValueError(
                f'rope scaling must be one of {get_args(Scaling)}, got {self.scaling!r}.'
            )
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f'rope must rotate an even number of features, got {self.dim}.')
        factors = (len(self.short), len(self.long))
        if self.scaling == 'longrope' and factors != (self.dim // 2,) * 2:
            raise ValueError(
                f'longrope needs {self.dim // 2} short and long factors for {self.dim} rotated '
                f'features, got {factors[0]} and {factors[1]}.'
            )

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on how long the text is."""
        return self.scaling in ('dynamic', 'longrope')

    def frequencies(self, length: jax.Array | None) -> jax.Array:
        """Radians per position.

        Args:
          length: int `(batch or 1, tokens or 1)`, of the text that a token is of; None only where
            nothing goes by it.

        Returns:
          float32 `(batch or 1, tokens or 1, dim / 2)`.
        """
        if self.by_length:
            assert length is not None
            return self._by_length(length[..., None])
        fixed = jnp.asarray(self._fixed(), jnp.float32)
        return fixed if length is None else jnp.broadcast_to(fixed, (*length.shape, self.dim // 2))

    @property
    def _steps(self) -> np.ndarray:
        """Exponents of the wavelengths, `(1, 1, dim / 2)`."""
        return np.arange(0, self.dim, 2)[None, None] / self.dim

    def _fixed(self) -> np.ndarray:
        """Those that every text has, `(1, 1, dim / 2)`."""
        plain = self.theta**-self._steps
        if self.scaling == 'linear':
            return plain / self.factor
        if self.scaling == 'llama3':
            return self._llama3(plain)
        return self._yarn(plain) if self.scaling == 'yarn' else plain

    def _by_length(self, length: jax.Array) -> jax.Array:
        """Those of texts of different lengths `(batch or 1, tokens or 1, 1)`."""
        plain = self.theta**-self._steps
        if self.scaling == 'longrope':
            short, long = (
                jnp.asarray(plain / np.array(f), jnp.float32) for f in (self.short, self.long)
            )
            return jnp.where(length > self.original, long, short)
        stretch = jnp.maximum(length, self.original).astype(jnp.float32) / self.original
        stretch = (self.factor * stretch - (self.factor - 1)) ** (self.dim / (self.dim - 2))
        return jnp.asarray(plain, jnp.float32) * stretch ** -jnp.asarray(self._steps, jnp.float32)

    def _llama3(self, plain: np.ndarray) -> np.ndarray:
        """Long waves stretched, short ones kept, a blend between."""
        turns = self.original * plain / (2 * math.pi)
        kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return plain * (kept + (1 - kept) / self.factor)

    def _yarn(self, plain: np.ndarray) -> np.ndarray:
        """The same, the blend a ramp over the index of the frequency."""

        def index(turns: float) -> float:
            return (
                self.dim
                * math.log(self.original / (turns * 2 * math.pi))
                / (2 * math.log(self.theta))
            )

        first, last = index(self.high), index(self.low)
        if self.whole:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.dim - 1)
        if first == last:
            last += 0.001  # a step is a steep ramp
        stretched = np.clip((np.arange(self.dim // 2) - first) / (last - first), 0, 1)
        return plain * (1 - stretched + stretched / self.factor)


def rotation(
    rope: Rope, position_ids: jax.Array, length: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the angles at which tokens are rotated.

    Args:
      rope: frequencies.
      position_ids: int `(batch or 1, tokens)`.
      length: as `Rope.frequencies` takes it.

    Returns:
      Two float32 arrays `(batch or 1, tokens, dim / 2)`.
    """
    angles = position_ids.astype(jnp.float32)[..., None] * rope.frequencies(length)
    return jnp.cos(angles) * rope.magnitude, jnp.sin(angles) * rope.magnitude


def rotate(x: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates pairs of features, one of the first half with one of the second.

    Args:
      x: `(batch, tokens, heads, head_dim)`.
      turn: as `rotation` returns it; features beyond its width are left alone.

    Returns:
      Array of the shape and dtype of `x`, computed in float32.
    """
    cos, sin = (t[:, :, None] for t in turn)
    width = cos.shape[-1]
    first, second, rest = jnp.split(x, (width, 2 * width), axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([*(t.astype(x.dtype) for t in turned), rest], axis=-1)
