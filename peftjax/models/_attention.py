"""The attention core: from query, key and value to the weighted sum of values.

Two forms of one function. `plain_attention` reads as the formula does. `attention` gives the same
numbers to rounding, in products that every backend has a fast kernel for: XLA on CPUs runs a
batched product `lhs @ rhs` or `lhs @ rhs^T` in its fast library, but not `lhs^T @ rhs`, which is
what differentiating the formula asks for.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array

MIXED = 'mixed'
"""The name of the result of `attention` as its gradient needs it; a program without a gradient has
no such value."""

_MASKED = -1e30  # Absorbs any score in float32, and a wholly masked row stays finite.


def plain_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    kept: jax.Array | None = None,
    rate: float = 0.0,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Scaled dot-product attention, as the formula reads.

    Args:
      query: `(batch, tokens, heads, head_dim)`.
      key: `(batch, keys, kv_heads, head_dim)`; `heads` is a multiple of `kv_heads`.
      value: as `key`.
      mask: bool `(batch, keys)` or `(batch, tokens, keys)`, True at the keys to attend to. None
        attends to all.
      kept: bool `(batch, heads, tokens, keys)`, True at the attention weights that dropout keeps.
      rate: of that dropout; what is kept is divided by `1 - rate`.
      scale: of the scores; None is `head_dim ** -0.5`.
      soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`.

    Returns:
      `(batch, tokens, heads, head_dim)` of the dtype of `value`. Softmax is float32.

    Example:
      >>> x = jnp.ones((1, 3, 2, 4))
      >>> plain_attention(x, x, x).shape
      (1, 3, 2, 4)

    Reference: Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762, section 3.2.1;
    groups of heads: Ainslie et al., GQA, 2023, arXiv:2305.13245.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (_swap(x) for x in (query, key, value))
    scores = _apart(_matmul_t(_together(query, key), key) * factor, query)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if mask is not None:
        scores = scores + _bias(mask)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = _matmul(_together(_only(kept, weights), key), _grown(value, rate)).astype(value.dtype)
    return _swap(_apart(mixed, query))


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    kept: jax.Array | None = None,
    rate: float = 0.0,
    *,
    scale: float | None = None,
) -> jax.Array:
    """`plain_attention` with a hand-written backward pass; reverse mode only, of any order.

    The scale is folded into the query and the softmax's sum divides the output instead of the
    weights. Kept for the gradient are the exponentials and the sum, not the scores.

    Args:
      query: `(batch, tokens, heads, head_dim)`.
      key: `(batch, keys, kv_heads, head_dim)`; `heads` is a multiple of `kv_heads`.
      value: as `key`.
      mask: bool `(batch, keys)` or `(batch, tokens, keys)`, True at the keys to attend to. None
        attends to all.
      kept: as in `plain_attention`.
      rate: as in `plain_attention`.
      scale: of the scores; None is `head_dim ** -0.5`.

    Returns:
      `(batch, tokens, heads, head_dim)` of the dtype of `value`.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (1, 3, 2, 4))
      >>> bool(jnp.allclose(attention(x, x, x), plain_attention(x, x, x), atol=1e-6))
      True
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (_swap(x) for x in (query, key, value))
    bias = None if mask is None else _bias(mask)
    groups = query.shape[1] // key.shape[1]
    if bias is not None and bias.shape[2] > 1:
        bias = jnp.tile(bias, (1, 1, groups, 1))
    kept = None if kept is None else _together(kept, key)
    scaled = _together(query * jnp.asarray(factor, query.dtype), key)
    return _swap(_apart(_core(scaled, key, _grown(value, rate), bias, kept), query))


def _bias(mask: Array) -> Array:
    mask = mask[:, None] if mask.ndim == 3 else mask[:, None, None]
    return jnp.where(mask, 0.0, _MASKED).astype(jnp.float32)


def _together(x: Array, key: Array) -> Array:
    """Heads that share a key's lie one after the other: `(batch, kv_heads, group * tokens, _)`."""
    return x.reshape(x.shape[0], key.shape[1], -1, x.shape[-1])


def _apart(x: Array, query: Array) -> Array:
    """The reverse, heads and tokens as in a query `(batch, heads, tokens, head_dim)`."""
    return x.reshape(*query.shape[:3], x.shape[-1])


def _only(kept: Array | None, weights: Array) -> Array:
    """Weights after dropout, but for the factor that `_grown` has."""
    return weights if kept is None else jnp.where(kept, weights, jnp.zeros((), weights.dtype))


def _grown(value: Array, rate: float) -> Array:
    """Values divided by `1 - rate`: one for each key, where the weights are one for each pair."""
    return value / jnp.asarray(1 - rate, value.dtype) if rate else value


def _swap(x: Array) -> Array:
    """`(batch, tokens, heads, head_dim)` <-> `(batch, heads, tokens, head_dim)`."""
    return x.transpose(0, 2, 1, 3)


def _turn(x: Array) -> Array:
    return x.transpose(0, 1, 3, 2)


def _matmul(lhs: Array, rhs: Array) -> Array:
    """`lhs @ rhs` per sentence and key head, summed in float32."""
    return _product(lhs, rhs, 2)


def _matmul_t(lhs: Array, rhs: Array) -> Array:
    """`lhs @ rhs^T` per sentence and key head, summed in float32."""
    return _product(lhs, rhs, 3)


def _product(lhs: Array, rhs: Array, axis: int) -> Array:
    dims = (((3,), (axis,)), ((0, 1), (0, 1)))
    wide = lax.dot_general(lhs, rhs, dims, preferred_element_type=jnp.float32)
    return wide if lhs.dtype == wide.dtype else _as_if(wide, lax.dot_general(lhs, rhs, dims))


@jax.custom_jvp
def _as_if(value: Array, rounded: Array) -> Array:
    """`value`, with the derivatives of `rounded`, which is the same and never computed.

    A wide cotangent would make the products that lead back wide.
    """
    del rounded
    return value


@_as_if.defjvp
def _as_if_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return primals[0], tangents[1].astype(primals[0].dtype)


@jax.custom_vjp
def _core(query: Array, key: Array, value: Array, bias: Array | None, kept: Array | None) -> Array:
    return _core_fwd(query, key, value, bias, kept)[0]


def _core_fwd(query, key, value, bias, kept):
    scores = _matmul_t(query, key)
    if bias is not None:
        scores = scores + bias
    # The output does not depend on what is subtracted, hence neither does its derivative.
    powers = jnp.exp(scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    inverse = 1 / powers.sum(axis=-1, keepdims=True)
    powers = powers.astype(value.dtype)
    out = (_matmul(_only(kept, powers), value) * inverse).astype(value.dtype)
    return out, (query, key, value, kept, powers, inverse, out)


def _core_bwd(saved, d_out):
    query, key, value, kept, powers, inverse, out = saved
    dtype = value.dtype
    d_sum = d_out.astype(jnp.float32) * inverse
    along = (d_sum * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    d_sum = d_sum.astype(dtype)
    d_value = _turn(_matmul(_turn(d_sum), _only(kept, powers)))
    d_scores = powers.astype(jnp.float32) * (_only(kept, _matmul_t(d_sum, value)) - along)
    d_scores = d_scores.astype(dtype)
    d_query = _matmul(d_scores, key)
    d_key = _turn(_matmul(_turn(query), d_scores))
    return (*(d.astype(dtype) for d in (d_query, d_key, d_value)), None, None)


def _core_kept(*args):
    out, saved = _core_fwd(*args)
    out = checkpoint_name(out, MIXED)
    return out, (*saved[:-1], out)


_core.defvjp(_core_kept, _core_bwd)
