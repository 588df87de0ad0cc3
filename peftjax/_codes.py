"""Numbers as codes of a few bits, a scale for each block: code books, rounding, packing.

All of it works along the last axis; the axes before it come along.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from peftjax._types import Array

NF4: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The code book of Dettmers et al. 2023 (arXiv:2305.14314), appendix E."""

STEPS = {'nf4': 1, 'int4': 7, 'int8': 127}
"""How many equal steps the codes have on either side of zero; those of nf4 are not equal."""

GROUP = 256
"""How many scales share one scale of their own (section 3 of the paper)."""


def bits(code: str) -> int:
    """How many bits a code has."""
    return 8 if code == 'int8' else 4


def absmax(x: Array, block: int) -> Array:
    """The largest magnitude of each block: `(*lead, width) -> (*lead, blocks)`."""
    short = -x.shape[-1] % block
    padded = jnp.pad(jnp.abs(x), [(0, 0)] * (x.ndim - 1) + [(0, short)]) if short else jnp.abs(x)
    return padded.reshape(*x.shape[:-1], -1, block).max(-1)


def repeated(scales: Array, block: int, width: int) -> Array:
    """The scale of each number: `(*lead, blocks) -> (*lead, width)`."""
    wide = jnp.broadcast_to(scales[..., None], (*scales.shape, block))
    wide = wide.reshape(*scales.shape[:-1], scales.shape[-1] * block)
    return wide if wide.shape[-1] == width else wide[..., :width]


def doubled(scales: Array) -> tuple[Array, Array]:
    """Scales as whole parts of the largest in each group of 256, rounded up.

    The paper takes the mean off and rounds to 8-bit floats; scales are positive and alike, so
    that 255 equal steps do as well, and rounding up keeps every number within its scale.

    Returns:
      `uint8` codes like `scales`, and the step of each group, float32.
    """
    step = absmax(scales, GROUP) / 255
    unit = repeated(jnp.where(step > 0, step, 1), GROUP, scales.shape[-1])
    return jnp.clip(jnp.ceil(scales / unit), 0, 255).astype(jnp.uint8), step


def encode(x: Array, code: str) -> Array:
    """The nearest code of each number in [-1, 1], as `uint8` or `int8`."""
    if code == 'nf4':
        middles = ((a + b) / 2 for a, b in zip(NF4, NF4[1:], strict=False))
        return sum(((x > m).astype(jnp.uint8) for m in middles), jnp.zeros(x.shape, jnp.uint8))
    steps = STEPS[code]
    whole = jnp.clip(jnp.round(x * steps), -steps, steps)
    return whole.astype(jnp.int8) if code == 'int8' else (whole + 8).astype(jnp.uint8)


def decode(codes: Array, code: str) -> Array:
    """What codes stand for, in float32, in units of `1 / STEPS[code]`."""
    if code == 'nf4':
        return _chosen(codes)
    return codes.astype(jnp.float32) - (0 if code == 'int8' else 8)


def _chosen(codes: Array) -> Array:
    """The level of each code, bit by bit of the code: what any device fuses, unlike a lookup.

    The bit patterns of two levels are chosen from by a mask, not by `where`, whose two constants
    would be of the size of the weight, and kept for the backward pass.
    """
    first = -(codes & 1).astype(jnp.int32)
    patterns = np.asarray(NF4, np.float32).view(np.int32).tolist()
    chosen = [(first & (a ^ b)) ^ a for a, b in zip(patterns[::2], patterns[1::2], strict=True)]
    for bit in (2, 4, 8):
        odd = (codes & bit) != 0
        chosen = [lax.select(odd, b, a) for a, b in zip(chosen[::2], chosen[1::2], strict=True)]
    return lax.bitcast_convert_type(chosen[0], jnp.float32)


def pack(codes: Array) -> Array:
    """Two codes of four bits in a byte, the first in the upper half."""
    if codes.shape[-1] % 2:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    pairs = codes.reshape(*codes.shape[:-1], -1, 2)
    return (pairs[..., 0] << 4) | pairs[..., 1]


def unpack(packed: Array, width: int) -> Array:
    """Undoes `pack`."""
    pairs = jnp.stack([packed >> 4, packed & 15], -1)
    codes = pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])
    return codes if codes.shape[-1] == width else codes[..., :width]
