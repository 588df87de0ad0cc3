"""Text from a language model: the prompt is read once, then one token at a time follows.

Prompts are moved to the end of their rows, so that every row's next token follows the last slot.
All but the last token of the prompt are read at once, without logits; the loop begins with it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from peftjax._processes import whole
from peftjax._sampling import Sampling
from peftjax._types import Array, Forward, Phi, PyTree


class Generated(NamedTuple):
    """What was generated.

    Attributes:
      tokens: int32 `(batch, length)`; `pad_id` after a row's end.
      lengths: int32 `(batch,)`, how many are tokens of the row, the stop token among them.
      log_probs: float32 `(batch, length)`, what the model gives each token, whatever the sampling;
        0 after the end. NaN where logits were not numbers, at which the row ended.
    """

    tokens: Array
    lengths: Array
    log_probs: Array


class _Plan(NamedTuple):
    """What is static in a run."""

    prefill: Forward
    decode: Forward
    init_cache: Callable[[int, int], Any]
    virtual: int
    shifted: int
    counted: bool
    length: int
    sampling: Sampling | None
    stop: tuple[int, ...]
    pad_id: int


def generate(
    forward: Forward,
    params: PyTree,
    phi: Phi,
    tokens: Array,
    attention_mask: Array | None = None,
    *,
    init_cache: Callable[[int, int], Any],
    length: int,
    sampling: Sampling | None = None,
    key: Array | None = None,
    stop: Sequence[int] = (),
    pad_id: int = 0,
) -> Generated:
    """Continues prompts, by a model with a static cache of keys and values.

    Compiled once for each forward, shape of prompts and setting; the loop ends early when all rows
    have ended. Any method works: those of virtual tokens are read once, with the prompt.

    A row ends where its logits are not numbers. That is an error; within a `jax.jit` of one's own,
    where none can be raised, `lengths` and a NaN among its `log_probs` tell.

    Args:
      forward: `forward(params, phi, ids, attention_mask=…, cache=…) -> (logits, cache)`: from the
        front door (`pj.lora_wrap(…)`), from `peft.wrap(model.apply_fn)`, or a function of one's
        own that takes no virtual tokens.
      params: the model's parameters.
      phi: as from `Peft.init`.
      tokens: int `(batch, tokens)`, prompts, padded on either side.
      attention_mask: `(batch, tokens)`, nonzero at real tokens; None is all. Each row needs one.
      init_cache: `(batch, slots) -> cache`, an empty cache, such as `model.init_cache`. There are
        slots for the prompts as they are padded, virtual tokens and `length`. Where rotations go by
        the length of a text (`dynamic`, `longrope`), that of a row is its real tokens, the virtual
        ones that it counts, and `length`, from the first step on and wherever it ends. Where it has
        an attribute `positions`, a number of learned ones, no more are asked of the model.
      length: the most tokens to generate.
      sampling: how tokens are drawn; None takes the likeliest (greedy).
      key: typed PRNG key, for sampling.
      stop: tokens that end a row.
      pad_id: what follows the end of a row.

    Returns:
      Tokens, their numbers, and their log-probabilities.

    Raises:
      ValueError: no tokens, a length below 1, sampling without a key or a key without sampling; a
        mask of another shape, or a row of it without a token; virtual tokens at the back; more
        tokens than positions; logits that are not numbers.

    Example:
      >>> import jax, peftjax as pj
      >>> from peftjax.models import Decoder, read_decoder_config
      >>> model = Decoder(read_decoder_config({'model_type': 'llama', 'vocab_size': 64,
      ...     'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 4,
      ...     'intermediate_size': 24}))
      >>> ids = jax.numpy.array([[5, 6, 7]])
      >>> params = model.init(jax.random.key(0), ids)['params']
      >>> forward, phi = pj.lora_wrap(
      ...     model.apply_fn, params, ids, key=jax.random.key(1), rank=2, target='q_proj')
      >>> out = pj.generate(forward, params, phi, ids, init_cache=model.init_cache, length=4)
      >>> out.tokens.shape, int(out.lengths[0])
      ((1, 4), 4)
    """
    _check(tokens, length, sampling, key)
    _check_mask(tokens, attention_mask)
    prefill, decode, rooms = _forwards(forward)
    plan = _Plan(
        prefill,
        decode,
        init_cache,
        sum(room.length for room in rooms),
        sum(room.length for room in rooms if room.shift),
        any(not room.shift for room in rooms),
        length,
        sampling,
        tuple(int(token) for token in stop),
        pad_id,
    )
    _check_positions(plan, _counts(tokens, attention_mask))
    mask = jnp.ones(tokens.shape) if attention_mask is None else jnp.asarray(attention_mask)
    key = jax.random.key(0) if key is None else key  # nothing is drawn without sampling
    out = _run(plan, params, phi, jnp.asarray(tokens), mask.astype(jnp.bool_), key)
    _check_numbers(out)
    return out


def _check(tokens: Array, length: int, sampling: Sampling | None, key: Array | None) -> None:
    if tokens.ndim != 2 or not tokens.shape[1]:
        raise ValueError(
            f'tokens must be (batch, tokens) with a token at least, to begin with; got shape '
            f'{tokens.shape}. Give the beginning-of-text token'
        )
    if length < 1:
        raise ValueError(f'length must be at least 1; got {length}')
    if (sampling is None) != (key is None):
        raise ValueError(
            'sampling and key go together: a key draws, and without sampling nothing is drawn; '
            f'got sampling={sampling}, key={key}'
        )


def _check_mask(tokens: Array, mask: Array | None) -> None:
    """Refuses a mask that does not go with the tokens, and, where it has values, an empty row."""
    if mask is not None and jnp.shape(mask) != tokens.shape:
        raise ValueError(
            f'attention_mask must have a number for each token, shape {tokens.shape}; got shape '
            f'{jnp.shape(mask)}'
        )
    if empty := np.flatnonzero(_counts(tokens, mask) == 0).tolist():
        raise ValueError(
            'attention_mask must leave each row a real token, to begin with; it leaves none in '
            f'rows {empty}. Give the beginning-of-text token'
        )


def _check_positions(plan: _Plan, counts: np.ndarray) -> None:
    """Refuses texts that come to more tokens than the model has positions, where that is known."""
    most = getattr(plan.init_cache, 'positions', None)
    longest = int(counts.max(initial=0))
    need = plan.shifted + longest + plan.length - 1
    if most is not None and need > most:
        raise ValueError(
            f'a text must have at most {most} tokens, one for each position of the model; '
            f'{longest} of a prompt, {plan.shifted} virtual ones and all but the last of '
            f'length={plan.length} are {need}. Lower length, or shorten the prompts'
        )


def _check_numbers(out: Generated) -> None:
    """Refuses rows that ended where their logits were not numbers, unless they are traced."""
    if isinstance(out.log_probs, Tracer):
        return
    lost = np.flatnonzero(whole(jnp.isnan(out.log_probs).any(axis=1))).tolist()
    if lost:
        ends = whole(out.lengths)[lost].tolist()
        raise ValueError(
            f'logits must be numbers; those of rows {lost} are not, after {ends} generated tokens. '
            'Likely causes: more tokens than the model has positions (lower length), an id outside '
            'of its vocabulary (padding has ids, too), params or phi that are not finite'
        )


def _counts(tokens: Array, mask: Array | None) -> np.ndarray:
    """How many real tokens each prompt has: at least one, as far as is known of a traced mask."""
    batch, width = tokens.shape
    if mask is None or isinstance(mask, Tracer):
        return np.full(batch, width if mask is None else 1)
    return (whole(mask) != 0).sum(axis=1)


def _forwards(forward: Forward) -> tuple[Forward, Forward, tuple[Any, ...]]:
    """The forward of the prompt, that of what follows, and the virtual tokens read between."""
    peft = getattr(forward, 'peft', None)
    if peft is None:
        return forward, forward, ()
    rooms = tuple(part.virtual for _, part in peft.method.parts if part.virtual is not None)
    if back := [room.length for room in rooms if room.side == 'back']:
        raise ValueError(
            'virtual tokens must lie in front of a text that goes on, where all that follows sees '
            f"them; got {sum(back)} with side='back'. Attach the method with side='front'"
        )
    return forward, forward.continued if rooms else forward, rooms


@functools.partial(jax.jit, static_argnums=0)
def _run(
    plan: _Plan, params: PyTree, phi: Phi, tokens: Array, mask: Array, key: Array
) -> Generated:
    tokens, mask = _to_the_end(tokens, mask)
    if plan.virtual and tokens.shape[1] == 1:
        # Virtual tokens are read with the prompt's beginning: there must be one.
        tokens, mask = (jnp.pad(x, ((0, 0), (1, 0))) for x in (tokens, mask))
    batch, width = tokens.shape
    cache = plan.init_cache(batch, plan.virtual + width + plan.length)
    positions = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    if width > 1:
        where = {'position_ids': jnp.maximum(positions[:, :-1], 0)} if plan.counted else {}
        real = mask[:, :-1].astype(jnp.int32)
        _, cache = plan.prefill(
            params, phi, tokens[:, :-1], attention_mask=real, cache=cache, **where
        )
    # Later calls know of no virtual tokens: what those add to positions is added here.
    return _loop(plan, params, phi, tokens[:, -1], positions[:, -1] + plan.shifted, cache, key)


def _to_the_end(tokens: Array, mask: Array) -> tuple[Array, Array]:
    """Rows whose last token is real."""
    width = tokens.shape[1]
    last = width - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    index = (jnp.arange(width)[None] + last[:, None] + 1) % width
    take = lambda x: jnp.take_along_axis(x, index, axis=1)
    return take(tokens), take(mask)


class _Carry(NamedTuple):
    step: Array
    token: Array
    cache: Any
    ended: Array
    out: Generated


def _loop(
    plan: _Plan, params: PyTree, phi: Phi, token: Array, position: Array, cache: Any, key: Array
) -> Generated:
    batch = len(token)

    def more(carry: _Carry) -> Array:
        return (carry.step < plan.length) & ~carry.ended.all()

    def body(carry: _Carry) -> _Carry:
        step, cache = carry.step, carry.cache
        where = {'position_ids': (position + step)[:, None]} if plan.counted else {}
        logits, cache = plan.decode(params, phi, carry.token[:, None], cache=cache, **where)
        logits = logits[:, -1].astype(jnp.float32)
        token = _next(plan, jax.random.fold_in(key, step), logits)
        return _written(plan, carry._replace(token=token, cache=cache), logits)

    empty = Generated(
        jnp.full((batch, plan.length), plan.pad_id, jnp.int32),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros((batch, plan.length), jnp.float32),
    )
    first = _Carry(
        jnp.zeros((), jnp.int32), token.astype(jnp.int32), cache, jnp.zeros(batch, bool), empty
    )
    return lax.while_loop(more, body, first).out


def _written(plan: _Plan, carry: _Carry, logits: Array) -> _Carry:
    """The carry of the next step, with the token among what was generated."""
    step, token, ended, out = carry.step, carry.token, carry.ended, carry.out
    scores = jax.nn.log_softmax(logits)
    lost = jnp.isnan(scores).any(axis=1)
    log_prob = jnp.take_along_axis(scores, token[:, None], axis=1)[:, 0]
    log_prob = jnp.where(ended, 0, jnp.where(lost, jnp.nan, log_prob))
    ended = ended | lost
    token = jnp.where(ended, plan.pad_id, token)
    out = Generated(
        out.tokens.at[:, step].set(token),
        out.lengths + (~ended).astype(jnp.int32),
        out.log_probs.at[:, step].set(log_prob),
    )
    ended = ended | (token[:, None] == jnp.asarray(plan.stop, jnp.int32)[None]).any(axis=1)
    return carry._replace(step=step + 1, token=token, ended=ended, out=out)


def _next(plan: _Plan, key: Array, logits: Array) -> Array:
    if plan.sampling is None:
        return logits.argmax(axis=-1).astype(jnp.int32)
    return plan.sampling.draw(key, logits)
