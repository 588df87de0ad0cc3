"""Losses of language models, fused with the head: `(tokens, vocabulary)` is never held."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from peftjax._mesh_axes import ROWS, automatic
from peftjax._one_pass import sum_in_one_pass, wide
from peftjax._types import Array


class Loss(NamedTuple):
    """A loss as a sum and what it is a sum over, so that batches add up.

    Over several batches (accumulated gradients, an evaluation) the mean is the sum of the totals
    over the sum of the counts, not the mean of the means.

    Attributes:
      total: float32 scalar, the weighted sum of the losses of all tokens.
      count: float32 scalar, the sum of their weights.
    """

    total: Array
    count: Array

    @property
    def mean(self) -> Array:
        """Total by count; zero where nothing counts."""
        return self.total / jnp.where(self.count == 0, 1, self.count)


def next_token_loss(
    hidden: Array,
    head: Array,
    targets: Array,
    *,
    weights: Array | None = None,
    bias: Array | None = None,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    chunk: int = 256,
) -> Loss:
    """Cross-entropy of a language model, from the hidden states before its head.

    The tokens go through the head in chunks, and the derivative is found in the same pass: by
    `hidden` alone where the head is frozen, which costs two products with the head and no gradient
    of it; by the head too where it is trained (three products); by the factors of an adapted head
    under `Peft.wrap` (two products and small ones; the adapted weight is not formed). Reverse mode
    only (`jax.jvp` of it is refused by JAX), of any order: gradients of gradients are exact.

    Products are in the dtype of `hidden`; logits and loss are float32 or wider.

    Args:
      hidden: `(..., tokens, width)`, floats. Chunks are cut along the tokens, so that a batch may
        be sharded along the dimensions before them, and the head along its vocabulary.
      head: `(width, vocabulary)`, of the same dtype; `embedding.T` where it is tied.
      targets: `(..., tokens)` integers: the token to predict at each position (`next_tokens` makes
        them of labels in Hugging Face's convention). Below zero, as -100: none.
      weights: `(..., tokens)` float32, what each token counts, 1 by default. Those without a
        target count nothing.
      bias: `(vocabulary,)`, of the head.
      soft_cap: logits become `soft_cap * tanh(logits / soft_cap)` (Gemma 2).
      z_loss: adds `z_loss * logsumexp(logits)**2` to the loss of a token (PaLM).
      chunk: about how many tokens go through the head at once, at least one of every row; on a mesh
        set by `jax.set_mesh`, on each of the devices that `data` and `fsdp` split the rows over.

    Returns:
      Total and count; `.mean` is what one trains on. A target beyond the vocabulary makes the
      total NaN.

    Raises:
      TypeError: dtypes that do not fit.
      ValueError: shapes that do not fit, `chunk` not positive.

    Example:
      >>> hidden, head = jnp.ones((2, 3, 4)), jnp.zeros((4, 8))
      >>> targets = jnp.array([[1, 2, -100], [3, -100, -100]])
      >>> loss = next_token_loss(hidden, head, targets)
      >>> loss.count, jnp.exp(loss.mean).round(3)
      (Array(3., dtype=float32), Array(8., dtype=float32))

    Reference: the soft cap is of Gemma Team, Gemma 2, 2024, arXiv:2408.00118, section 2; the z-loss
    of Chowdhery et al., PaLM, 2022, arXiv:2204.02311, section 5.
    """
    _check(hidden, head, targets, weights, bias, chunk)
    own = wide(hidden.dtype)
    if targets.dtype.itemsize < 4:  # else they could not count to the vocabulary
        targets = targets.astype(jnp.int32)

    def part(shared: Any, tokens: Any) -> Array:
        hidden, targets, weights = tokens
        # what lies at padding may be anything: it gets no say, nor a gradient
        hidden = jnp.where((targets >= 0)[..., None], hidden, 0)
        logits = _logits(hidden, *shared)
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        return (_counted(targets, weights, own) * _losses(logits, targets, z_loss)).sum()

    tokens = (hidden, targets, weights)
    size = chunk * _sharers(targets.shape[:-1])
    parts = jax.tree.map(lambda x: _chunks(x, targets.ndim - 1, size), tokens)
    total = sum_in_one_pass(part, (head, bias), parts)
    return Loss(total, _counted(targets, weights, own).sum())


def next_tokens(labels: Array, segments: Array | None = None) -> Array:
    """The target at each position: the label of the token after it.

    Args:
      labels: `(..., tokens)` integers, each token's own id, or -100 where it is not to be learned
        (the convention of Hugging Face's datasets and models).
      segments: `(..., tokens)` integers, the example that each token is of, where rows hold
        several: no example predicts the next one's first token.

    Returns:
      As `labels`; the last one of each row is -100.

    Raises:
      TypeError: labels that cannot be -100: unsigned integers, floats.

    Example:
      >>> next_tokens(jnp.array([5, 6, 7, 8]), jnp.array([1, 1, 2, 2]))
      Array([   6, -100,    8, -100], dtype=int32)
    """
    _check_signed('labels', labels)
    last = jnp.full_like(labels[..., :1], -100)
    targets = jnp.concatenate([labels[..., 1:], last], -1)
    if segments is None:
        return targets
    after = jnp.concatenate([segments[..., 1:], segments[..., -1:]], -1)
    return jnp.where(segments == after, targets, -100)


def _counted(targets: Array, weights: Array | None, dtype: Any) -> Array:
    """What each token counts."""
    real = targets >= 0
    return real.astype(dtype) if weights is None else jnp.where(real, weights.astype(dtype), 0)


def _losses(logits: Array, targets: Array, z_loss: float) -> Array:
    """The loss of each token; what no token says is not looked at."""
    # the result does not depend on what is subtracted, hence neither does its derivative
    top = lax.stop_gradient(logits).max(-1)
    norm = top + jnp.log(jnp.exp(logits - top[..., None]).sum(-1))
    # a masked sum instead of a lookup: it fuses, and a sharded vocabulary stays where it is
    there = lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    chosen = jnp.where(there, logits, 0).sum(-1)
    losses = norm - chosen
    if z_loss:
        losses = losses + z_loss * norm * norm
    return jnp.where(targets < logits.shape[-1], losses, jnp.nan)


def _logits(hidden: Array, head: Array, bias: Array | None) -> Array:
    """The head, summed and kept in a wide dtype, with a backward pass in the narrow one."""
    along = (((hidden.ndim - 1,), (0,)), ((), ()))
    logits = lax.dot_general(hidden, head, along, preferred_element_type=wide(hidden.dtype))
    logits = logits if bias is None else logits + bias.astype(logits.dtype)
    if hidden.dtype == logits.dtype:
        return logits
    narrow = lax.dot_general(hidden, head, along)
    return _as_if(logits, narrow if bias is None else narrow + bias.astype(hidden.dtype))


@jax.custom_vjp
def _as_if(value: Array, rounded: Array) -> Array:
    """`value`, with the derivatives of `rounded`, which is the same and never computed.

    A wide cotangent would make a wide copy of the head in the product that leads back.
    """
    del rounded
    return value


def _as_if_bwd(kept: Array, by: Array) -> tuple[None, Array]:
    return None, by.astype(kept.dtype)


_as_if.defvjp(lambda value, rounded: (value, rounded[:0]), _as_if_bwd)


def _sharers(rows: tuple[int, ...]) -> int:
    """How many devices share the rows: on each, a chunk must be worth reading the head for."""
    sizes = automatic()
    count = math.prod(sizes[name] for name in ROWS if name in sizes)
    return 1 if not rows or rows[0] % count else count


def _chunks(x: Array, axis: int, chunk: int) -> Array:
    """`(..., tokens, *rest)` to `(chunks, ..., tokens of a chunk, *rest)`, padded with -1."""
    rows, tokens = math.prod(x.shape[:axis]), x.shape[axis]
    count = min(max(tokens, 1), -(-rows * tokens // chunk)) or 1
    size = -(-tokens // count)
    edges = [(0, size * count - tokens if d == axis else 0) for d in range(x.ndim)]
    x = jnp.pad(x, edges, constant_values=-1) if any(edges[axis]) else x
    x = x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _check(hidden: Any, head: Any, targets: Any, weights: Any, bias: Any, chunk: int) -> None:
    if hidden.ndim < 2 or head.ndim != 2 or hidden.shape[-1] != head.shape[0]:
        raise ValueError(
            'hidden must be (..., tokens, width) and head (width, vocabulary): received '
            f'{hidden.shape} and {head.shape}. A tied embedding goes in as embedding.T'
        )
    for name, array in (('targets', targets), ('weights', weights)):
        if array is not None and array.shape != hidden.shape[:-1]:
            raise ValueError(
                f'{name} must be {hidden.shape[:-1]}, one for each hidden state: received '
                f'{array.shape}'
            )
    if bias is not None and bias.shape != head.shape[1:]:
        raise ValueError(f'bias must be {head.shape[1:]}, as the head: received {bias.shape}')
    if hidden.dtype != head.dtype or not jnp.issubdtype(head.dtype, jnp.floating):
        raise TypeError(
            f'hidden and head must be floats of one dtype: received {hidden.dtype} and '
            f'{head.dtype}. Cast one of them'
        )
    _check_signed('targets', targets)
    if chunk < 1:
        raise ValueError(f'chunk must be at least 1: received {chunk}')


def _check_signed(name: str, ids: Any) -> None:
    if not jnp.issubdtype(ids.dtype, jnp.signedinteger):
        raise TypeError(
            f'{name} must be signed integers, since -100 says none: received {ids.dtype}. '
            'Cast them to int32'
        )
