"""Llama in plain functions, with methods written into it by hand.

Parameters are those of `peftjax.models.Decoder`, phi is that of the method; the functions use
nothing of the engine. What a gradient keeps is what the model keeps: the same values by name.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import peftjax as pj
from peftjax.losses import next_token_loss
from peftjax.models import SAVED, Decoder, DecoderConfig, attention
from peftjax.models._causal import causal_attention

Phi = Mapping[str, jax.Array]
Linear = Callable[[str, jax.Array, jax.Array, Phi], jax.Array]
LAYERS = 'model/layers/'


def plain(name: str, x: jax.Array, w: jax.Array, phi: Phi) -> jax.Array:
    return x @ w


def lora(name: str, x: jax.Array, w: jax.Array, phi: Phi, scale: float) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])  # else XLA transposes x for the gradient of `a`
    return x @ w + (((rows @ phi['a']) * scale) @ phi['b']).reshape(*x.shape[:-1], -1)


def dora(name: str, x: jax.Array, w: jax.Array, phi: Phi, scale: float) -> jax.Array:
    return lora(name, x, w, phi, scale) * phi['gain'][None, None]


def gains(params: Any, phi: Any, scale: float) -> Any:
    """DoRA's `m / |w + scale * a @ b|` of each output, all layers at once."""

    def of(w: jax.Array, a: jax.Array, b: jax.Array, m: jax.Array) -> jax.Array:
        a, b = lax.stop_gradient((a, b))
        square = (w * w).sum(0) + 2 * scale * ((w.T @ a).T * b).sum(0)
        return m / jnp.sqrt(square + scale**2 * (b * ((a.T @ a) @ b)).sum(0))

    def at(path: str, pair: Phi) -> Phi:
        w = functools.reduce(lambda tree, key: tree[key], path.split('/'), params)
        return {**pair, 'gain': jax.vmap(of)(w, pair['a'], pair['b'], pair['m'])}

    return {path: at(path, pair) for path, pair in phi.items()}


def ia3(name: str, x: jax.Array, w: jax.Array, phi: Phi) -> jax.Array:
    scale = phi['l'][None, None]
    return (x * scale) @ w if name == 'down_proj' else (x @ w) * scale


def adapter(name: str, x: jax.Array, w: jax.Array, phi: Phi) -> jax.Array:
    return bottleneck(x @ w, phi, jax.nn.relu)


def bottleneck(y: jax.Array, phi: Phi, activation: Callable) -> jax.Array:
    inner = activation(y @ phi['down'] + phi['down_bias'][None, None])
    return y + (inner @ phi['up'] + phi['up_bias'][None, None])


def norm(config: DecoderConfig, scale: jax.Array, x: jax.Array) -> jax.Array:
    mean = (x * x).mean(-1, keepdims=True)
    return x * lax.rsqrt(mean + config.norm.epsilon) * scale[None, None]


def turn(config: DecoderConfig, first: int, tokens: int) -> tuple[jax.Array, jax.Array]:
    width, (kind,) = config.attention.head_dim, config.kinds
    assert kind.rope is not None and kind.rope.scaling == 'default'
    frequencies = kind.rope.theta ** (-np.arange(0, width, 2) / width)
    places = jnp.arange(first, first + tokens, dtype=jnp.float32)
    angles = places[:, None] * frequencies.astype(np.float32)[None]
    return jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    (cos, sin), (left, right) = angles, jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def block(
    config: DecoderConfig, linear: Linear, x: jax.Array, layer: Any, phi: Any, angles: Any
) -> jax.Array:
    """One layer; `phi` has the paths below the layers."""

    def dense(module: str, name: str, x: jax.Array) -> jax.Array:
        w, path = layer[module][name]['kernel'], f'{module}/{name}/kernel'
        return linear(name, x, w, phi[path]) if path in phi else x @ w

    def named(name: str, x: jax.Array) -> jax.Array:
        x, path = checkpoint_name(x, name), f'@{name}'
        return bottleneck(x, phi[path], jax.nn.silu) if path in phi else x

    def heads(name: str, h: jax.Array) -> jax.Array:
        return dense('self_attn', name, h).reshape(*h.shape[:-1], -1, config.attention.head_dim)

    def prefixed(name: str, x: jax.Array) -> jax.Array:
        if f'@{name}' not in phi:
            return x
        rows = phi[f'@{name}']['prefix']
        return jnp.concatenate([jnp.broadcast_to(rows, (len(x), *rows.shape)), x], axis=1)

    h = norm(config, layer['input_layernorm']['scale'], x)
    query, key, value = (heads(name, h) for name in ('q_proj', 'k_proj', 'v_proj'))
    query = checkpoint_name(rotate(query, angles), 'query')
    key = prefixed('key', checkpoint_name(rotate(key, angles), 'key'))
    value = prefixed('value', checkpoint_name(value, 'value'))
    before = key.shape[1] - query.shape[1]
    causal = jnp.tril(jnp.ones((query.shape[1], key.shape[1]), bool), before)[None]
    if before:
        mixed = attention(query, key, value, causal)
    else:
        mixed = causal_attention(attention, query, key, value, causal)
    y = dense('self_attn', 'o_proj', mixed.reshape(*x.shape[:-1], -1))
    x = x + named('attention_output', y)
    h = norm(config, layer['post_attention_layernorm']['scale'], x)
    gate = checkpoint_name(dense('mlp', 'gate_proj', h), 'gate')
    up = checkpoint_name(dense('mlp', 'up_proj', h), 'up')
    return x + named('mlp_output', dense('mlp', 'down_proj', jax.nn.silu(gate) * up))


def hidden(
    config: DecoderConfig, linear: Linear, params: Any, phi: Any, tokens: jax.Array
) -> jax.Array:
    """Hidden states before the head, of real tokens."""
    body = params['model']
    x = body['embed_tokens']['embedding'][tokens]
    prompt = phi.get('model/embed_tokens/embedding')
    before = 0
    if prompt is not None:
        rows = prompt['prompt']
        x = jnp.concatenate([jnp.broadcast_to(rows, (len(x), *rows.shape)), x], axis=1)
        before = len(rows)
    inside = {
        path.removeprefix(LAYERS): at for path, at in phi.items() if path.startswith((LAYERS, '@'))
    }
    length = max([at['prefix'].shape[1] for at in inside.values() if 'prefix' in at], default=0)
    angles = turn(config, length, x.shape[1])
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED)

    @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def step(x: jax.Array, sliced: Any) -> tuple[jax.Array, None]:
        return block(config, linear, x, *sliced, angles), None

    x, _ = lax.scan(step, x, (body['layers'], inside))
    return norm(config, body['norm']['scale'], x)[:, before:]


# Twins -------------------------------------------------------------------------------------------

RANK, SCALE = 4, 1.5
LINEARS = '(q|k|v|o|gate|up|down)_proj/kernel'
LOW_RANK: Any = dict(rank=RANK, alpha=SCALE * RANK, target=LINEARS)
METHODS: dict[str, tuple[pj.Method, Linear]] = {
    'LoRA': (pj.Lora(**LOW_RANK), functools.partial(lora, scale=SCALE)),
    'DoRA': (pj.Dora(**LOW_RANK), functools.partial(dora, scale=SCALE)),
    'IA3': (pj.Ia3(target='(k|v|down)_proj/kernel', feedforward='down_proj'), ia3),
    'adapters': (pj.Adapter(target='(o|down)_proj/kernel'), adapter),
    'adapters (Houlsby)': (pj.HOULSBY, plain),
    'prompt tuning': (pj.PromptTuning(length=8), plain),
    'prefix tuning': (pj.PrefixTuning(length=8), plain),
}


def ours(method: pj.Method, model: Decoder, tokens: Any) -> tuple[pj.Peft, Callable]:
    """A method on a decoder, and `(params, phi, tokens)` to hidden states; shapes are enough."""
    body = functools.partial(model.apply_fn, method='hidden')
    peft = pj.attach(method, body, abstract(model, tokens), tokens)
    return peft, peft.wrap(body)


def by_hand(name: str, config: DecoderConfig) -> Callable:
    """The same function with the method written into it."""
    _, linear = METHODS[name]

    def forward(params: Any, phi: Any, tokens: jax.Array) -> jax.Array:
        phi = gains(params, phi, SCALE) if name == 'DoRA' else phi
        return hidden(config, linear, params, phi, tokens)

    return forward


def abstract(model: Decoder, tokens: Any) -> Any:
    """Shapes and dtypes of a model's parameters."""
    return jax.eval_shape(model.init, jax.random.key(0), tokens)['params']


def loss(model: Decoder, forward: Callable, chunk: int) -> Callable:
    """The loss of the next token: `(phi, params, tokens, targets)` to a number."""

    def mean(phi: Any, params: Any, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        head = model.head_weight(params).weight
        return next_token_loss(forward(params, phi, tokens), head, targets, chunk=chunk).mean

    return mean


def step(model: Decoder, forward: Callable, chunk: int) -> Callable:
    """The gradient step: that loss and its gradient by phi."""
    return jax.value_and_grad(loss(model, forward, chunk))
