"""A small decoder, unrolled and scanned, plain and with LoRA written into it by hand."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from zoo import normal

LINEARS = ('q', 'k', 'v', 'o', 'up', 'down')
WIDTH, INNER, HEADS, VOCABULARY = 64, 128, 4, 50


def parameters(layers: int, stacked: bool) -> dict[str, Any]:
    """Random parameters, the layers in a list or stacked."""
    shapes = {name: (WIDTH, WIDTH) for name in 'qkvo'}
    shapes |= {'up': (WIDTH, INNER), 'down': (INNER, WIDTH)}

    def layer(*stack: int) -> dict[str, Any]:
        weights = {
            name: {
                'kernel': normal(i, *stack, *shape, fan=shape[0]),
                'bias': normal(i, *stack, shape[1], fan=100),
            }
            for i, (name, shape) in enumerate(shapes.items())
        }
        return {**weights, 'norm': {'scale': 1 + normal(9, *stack, WIDTH, fan=100)}}

    blocks = layer(layers) if stacked else [layer() for _ in range(layers)]
    return {'embed': normal(8, VOCABULARY, WIDTH), 'layers': blocks}


def linear(layer: Any, name: str, x: jax.Array, lora: Any = None) -> jax.Array:
    """`x @ w + b`, and the low-rank path where there is one."""
    w, b = layer[name]['kernel'], layer[name]['bias']
    y = x @ w
    if lora is not None and name in lora:
        pair, scale = lora[name]
        y = y + ((x @ pair['a']) * scale) @ pair['b']
    return y + b


def block(layer: Any, x: jax.Array, lora: Any = None) -> jax.Array:
    """Attention and an MLP behind one norm each."""
    dense = lambda name, x: linear(layer, name, x, lora)
    norm = lambda x: x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True)) * layer['norm']['scale']
    heads = lambda x: x.reshape(*x.shape[:-1], HEADS, -1)
    h = norm(x)
    q, k, v = (heads(dense(name, h)) for name in 'qkv')
    scores = jnp.einsum('bthd,bshd->bhts', q, k) / 4
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
    mixed = jnp.einsum('bhts,bshd->bthd', weights, v).reshape(x.shape)
    x = x + dense('o', mixed)
    return x + dense('down', jax.nn.silu(dense('up', norm(x))))


def unrolled(params: Any, tokens: jax.Array, lora: Any = None) -> jax.Array:
    """Logits; `lora` is a list of `{name: ({'a', 'b'}, scale)}`."""
    x = params['embed'][tokens]
    for i, layer in enumerate(params['layers']):
        x = block(layer, x, None if lora is None else lora[i])
    return x @ params['embed'].T


def scanned(params: Any, tokens: jax.Array, lora: Any = None) -> jax.Array:
    """The same with the layers stacked and recomputed; `lora` is `{name: ({'a', 'b'}, scale)}`."""
    scales = {name: scale for name, (_, scale) in (lora or {}).items()}
    pairs = {name: pair for name, (pair, _) in (lora or {}).items()}

    @jax.checkpoint
    def step(x: jax.Array, sliced: Any) -> tuple[jax.Array, None]:
        layer, pairs = sliced
        return block(layer, x, {name: (pair, scales[name]) for name, pair in pairs.items()}), None

    x, _ = lax.scan(step, params['embed'][tokens], (params['layers'], pairs))
    return x @ params['embed'].T
