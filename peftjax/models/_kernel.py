"""cuDNN's attention: where it serves, how it is called, and what a gradient keeps of it."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.models._attention import MIXED
from peftjax.models._compute import Compute
from peftjax.models._decoder_config import Attention
from peftjax.models._sight import Sight

Array = jax.Array

_FORWARD = 'dot_product_attention_fwd'
"""How the kernel's primitive is called; JAX has no public name for it. Were it renamed, a gradient
would compute attention once more, and be the same."""


def serves(query: Array, key: Array, sight: Sight, shape: Attention, compute: Compute) -> bool:
    """Whether the kernel computes this; where it does not, nothing of JAX's fails or warns.

    Args:
      query: `(batch, tokens, heads, head_dim)`.
      key: `(batch, keys, kv_heads, head_dim)`.
      sight: which keys a token sees.
      shape: of the attention.
      compute: the form of attention that is wanted.

    Returns:
      True on an NVIDIA GPU, in half precision, for the shapes that the kernel is documented to
      take.
    """
    tokens, keys = query.shape[1], key.shape[1]
    even = sight.mask is None or (tokens % 2 == 0 and keys % 2 == 0)
    return _fits(shape, compute, query.dtype) and tokens > 1 and even


def kernel_attention(query: Array, key: Array, value: Array, sight: Sight, scale: float) -> Array:
    """Attention by the kernel.

    A mask becomes a bias: the kernel knows segments only by a door that JAX keeps to itself. Where
    no key lies after its token, that is said besides, and the upper half is not computed.

    Args:
      query: `(batch, tokens, heads, head_dim)`.
      key: `(batch, keys, kv_heads, head_dim)`.
      value: as `key`.
      sight: which keys a token sees.
      scale: of the scores.

    Returns:
      Array of the shape of `query`.
    """
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=None if sight.mask is None else sight.mask[:, None],
        scale=scale,
        is_causal=sight.causal,
        local_window_size=None if sight.window is None else (sight.window - 1, 0),
        implementation='cudnn',
    )


def keep(shape: Attention, compute: Compute) -> Callable[..., Any]:
    """What a gradient keeps of a block: the values that `compute.save` names.

    A backward pass of attention wants its result, which the block names `context` only when it has
    another shape. Where that is asked for, the result is kept as attention made it instead, so that
    it is not computed again; of cuDNN's kernel also the logarithms of its sums, which have no name.

    Args:
      shape: of the attention.
      compute: the names, the dtype, and the form of attention that is wanted.

    Returns:
      A policy for `jax.checkpoint`.
    """
    names = compute.save or ()
    named = jax.checkpoint_policies.save_only_these_names
    kernel = _fits(shape, compute, compute.dtype)
    own = kernel or (compute.fused and shape.soft_cap is None)
    if 'context' not in names or not own:
        return named(*names)
    others = [name for name in names if name != 'context']
    if not kernel:
        return named(*others, MIXED)
    others = named(*others)

    def policy(primitive: Any, *values: Any, **params: Any) -> Any:
        return primitive.name.startswith(_FORWARD) or others(primitive, *values, **params)

    return policy


def _fits(shape: Attention, compute: Compute, dtype: Any) -> bool:
    """Whether there is a kernel for such heads on the device at hand, and it may be taken."""
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    # The kernel has one derivative, backward; the plain form has all.
    if compute.attention == 'plain' or shape.soft_cap is not None or not half:
        return False
    capability = _capability()
    widest = 256 if capability >= 9 else 128
    return capability >= 8 and shape.head_dim % 8 == 0 and shape.head_dim <= widest


def _capability() -> float:
    """CUDA's compute capability of the device at hand; 0 where it has none."""
    if jax.default_backend() != 'gpu':
        return 0.0
    found = str(getattr(jax.devices()[0], 'compute_capability', ''))
    return float(found) if re.fullmatch(r'\d+\.\d+', found) else 0.0  # AMD's are names
