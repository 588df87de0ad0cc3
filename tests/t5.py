"""T5 as a plain function over PyTorch's tensors, by their names: no model of the zoo is like it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = Any


def t5(heads: int, params: Params, input_ids: Any, attention_mask: Any, decoder_ids: Any) -> Any:
    """Hidden states of the decoder, `(batch, tokens, width)`."""
    table, kept = params['shared']['weight'], attention_mask.astype(bool)[:, None, None]
    count = decoder_ids.shape[1]
    causal = jnp.tril(jnp.ones((count, count), bool))[None, None]
    memory = _stack(heads, params['encoder'], table[input_ids], kept)
    return _stack(heads, params['decoder'], table[decoder_ids], causal, memory, kept)


def _stack(heads: int, own: Params, x: Any, mask: Any, memory: Any = None, kept: Any = None) -> Any:
    blocks = [own['block'][str(i)]['layer'] for i in range(len(own['block']))]
    table = blocks[0]['0']['SelfAttention']['relative_attention_bias']['weight']
    bias = _bias(table, x.shape[1], both_ways=memory is None)
    for block in blocks:
        h = _norm(block['0'], x)
        x = x + _attend(heads, block['0']['SelfAttention'], h, h, mask, bias)
        if memory is not None:
            h = _norm(block['1'], x)
            x = x + _attend(heads, block['1']['EncDecAttention'], h, memory, kept, jnp.zeros(()))
        last = block[str(len(block) - 1)]
        dense = last['DenseReluDense']
        x = x + _linear(dense['wo'], jax.nn.relu(_linear(dense['wi'], _norm(last, x))))
    return _scaled(own['final_layer_norm'], x)


def _linear(own: Params, x: Any) -> Any:
    return x @ own['weight'].T


def _norm(own: Params, x: Any) -> Any:
    return _scaled(own['layer_norm'], x)


def _scaled(own: Params, x: Any) -> Any:
    size = jnp.square(x).mean(-1, keepdims=True)
    return own['weight'][None, None] * (x * jax.lax.rsqrt(size + 1e-6))


def _attend(heads: int, own: Params, x: Any, keys: Any, mask: Any, bias: Any) -> Any:
    split = lambda y: y.reshape(*y.shape[:2], heads, -1)
    q, k, v = (split(_linear(own[n], y)) for n, y in (('q', x), ('k', keys), ('v', keys)))
    scores = jnp.einsum('bqhd,bkhd->bhqk', q, k) + bias  # T5 does not scale
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min))
    mixed = jnp.einsum('bhqk,bkhd->bqhd', weights, v)
    return _linear(own['o'], mixed.reshape(*x.shape[:2], -1))


def _bias(table: Any, tokens: int, both_ways: bool, farthest: int = 128) -> Any:
    """What distances add to scores, `(1, heads, tokens, tokens)`; far ones share by logarithm."""
    distance = np.arange(tokens)[None] - np.arange(tokens)[:, None]
    count, first = len(table), 0
    if both_ways:
        count, first = count // 2, (distance > 0) * (count // 2)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    near = count // 2
    far = np.log(np.maximum(distance, 1) / near) / math.log(farthest / near) * (count - near)
    place = np.where(distance < near, distance, np.minimum(near + far.astype(int), count - 1))
    return table[first + place].transpose(2, 0, 1)[None]
