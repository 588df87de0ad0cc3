"""One small transformer, written in every style: the models on which the laws are tested.

All of them take token ids `(2, 5)` and give `(2, 5, 6)`. Modules and intermediates bear the same
names everywhere, so that one target fits all.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from zoo import Zoo, ids, normal

from peftjax import models

VOCABULARY, WIDTH, HEADS, INNER, OUT = 7, 8, 2, 12, 6
TOKENS = ids(3, VOCABULARY, 2, 5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """An apply function of token ids, and its parameters.

    Attributes:
      fn: `fn(params, ids)`.
      params: pytree of float32 arrays.
      inputs: the token ids.
    """

    fn: Callable[..., jax.Array]
    params: Any
    inputs: jax.Array = dataclasses.field(default_factory=lambda: TOKENS)


MODELS = Zoo()


def attend(query, key, value):
    """Attention over `(…, tokens, heads, width)`."""
    scores = jnp.einsum('...qhd,...khd->...hqk', query, key) / 2
    return jnp.einsum('...hqk,...khd->...qhd', jax.nn.softmax(scores), value)


def normalized(x, scale, bias):
    """Layer norm in the dtype of `x`."""
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale + bias


def transformer(part, embedded, layers):
    """The model in terms of `part(layer, name, x)`, its modules at work."""
    x = checkpoint_name(embedded, 'embeddings')
    for layer in layers:
        x = block(lambda name, x, layer=layer: part(layer, name, x), x)
    return part(None, 'head', x)


def block(part, x):
    """One post-norm block."""
    heads = (*x.shape[:-1], HEADS, WIDTH // HEADS)
    names = ('query', 'key', 'value')
    q, k, v = (checkpoint_name(part(name, x).reshape(heads), name) for name in names)
    mixed = attend(q, k, v).reshape(x.shape)
    y = checkpoint_name(part('out', mixed), 'attention_output')
    x = checkpoint_name(part('norm', x + y), 'attention_residual')
    y = checkpoint_name(part('down', jax.nn.gelu(part('up', x))), 'mlp_output')
    return checkpoint_name(part('last_norm', x + y), 'mlp_residual')


def module(p, x):
    """A linear layer or a norm, as its parameters say."""
    if 'scale' in p:
        return normalized(x, p['scale'][None, None], p['bias'][None, None])
    return x @ p['kernel'] + p['bias'][None, None]


SIZES = {
    'query': (WIDTH, WIDTH),
    'key': (WIDTH, WIDTH),
    'value': (WIDTH, WIDTH),
    'out': (WIDTH, WIDTH),
    'up': (WIDTH, INNER),
    'down': (INNER, WIDTH),
}


def _parameters(*stack: int) -> dict[str, Any]:
    """Random parameters of one block, or of a stack of them."""
    layer = {
        name: {
            'kernel': normal(i, *stack, *size, fan=size[0]),
            'bias': 0.3 * normal(20 + i, *stack, size[1]),
        }
        for i, (name, size) in enumerate(SIZES.items())
    }
    for i, name in enumerate(('norm', 'last_norm')):
        scale = 1 + 0.2 * normal(30 + i, *stack, WIDTH)
        layer[name] = {'scale': scale, 'bias': 0.2 * normal(40 + i, *stack, WIDTH)}
    return layer


def _around() -> dict[str, Any]:
    """Random parameters of what is around the blocks."""
    head = {'kernel': normal(51, WIDTH, OUT, fan=WIDTH), 'bias': normal(52, OUT)}
    return {'wte': {'embedding': normal(50, VOCABULARY, WIDTH)}, 'head': head}


@MODELS
def plain() -> Model:
    """Two blocks, one after the other."""

    def fn(params, ids):
        layers = [params['layers'][name] for name in '01']
        part = lambda layer, name, x: module((layer or params)[name], x)
        return transformer(part, params['wte']['embedding'][ids], layers)

    return Model(fn=fn, params={**_around(), 'layers': {'0': _parameters(), '1': _parameters()}})


@MODELS
def scanned() -> Model:
    """Two blocks under `scan` and `remat`."""

    def fn(params, ids):
        x = checkpoint_name(params['wte']['embedding'][ids], 'embeddings')
        body = lambda x, layer: (block(lambda name, x: module(layer[name], x), x), None)
        x, _ = lax.scan(jax.checkpoint(body), x, params['layers'])
        return module(params['head'], x)

    return Model(fn=fn, params={**_around(), 'layers': _parameters(2)})


class LinenNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param('scale', nn.initializers.ones, (WIDTH,))
        bias = self.param('bias', nn.initializers.zeros, (WIDTH,))
        return normalized(x, scale[None, None], bias[None, None])


class LinenBlock(nn.Module):
    """Kernels of queries, keys and values have three dimensions."""

    @nn.compact
    def __call__(self, x, _):
        def part(name, x):
            if 'norm' in name:
                return LinenNorm(name=name)(x)
            if name in ('query', 'key', 'value'):
                return nn.DenseGeneral((HEADS, WIDTH // HEADS), name=name, dtype=x.dtype)(x)
            return nn.Dense(SIZES[name][1], name=name, dtype=x.dtype)(x)

        return block(part, x), None


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(VOCABULARY, WIDTH, name='wte')
        x = checkpoint_name(embed(ids), 'embeddings')
        layers = nn.scan(
            nn.remat(LinenBlock), variable_axes={'params': 1}, split_rngs={'params': True}, length=2
        )
        x, _ = layers(name='layers')(x, None)
        return nn.Dense(OUT, name='head', dtype=x.dtype)(x)


@MODELS
def linen() -> Model:
    """Scanned along the second axis, with kernels of three dimensions."""
    model = LinenModel()
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)['params']
    params = jax.tree.map(lambda s: 0.5 * normal(sum(s.shape), *s.shape), shapes)
    return Model(fn=lambda params, ids: model.apply({'params': params}, ids), params=params)


class NnxNorm(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones(WIDTH))
        self.bias = nnx.Param(jnp.zeros(WIDTH))

    def __call__(self, x):
        return normalized(x, self.scale[...][None, None], self.bias[...][None, None])


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.wte = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        for name, (a, b) in SIZES.items():
            if name in ('query', 'key', 'value'):
                layer = nnx.LinearGeneral(a, (HEADS, b // HEADS), rngs=rngs)
            else:
                layer = nnx.Linear(a, b, rngs=rngs)
            setattr(self, name, layer)
        self.norm = NnxNorm()
        self.last_norm = NnxNorm()
        self.head = nnx.Linear(WIDTH, OUT, rngs=rngs)

    def __call__(self, ids):
        part = lambda layer, name, x: getattr(self, name)(x)
        return transformer(part, self.wte.embedding[...][ids], ['only'])


@MODELS
def flax_nnx() -> Model:
    """One block, split and merged."""
    graph, params, rest = nnx.split(NnxModel(nnx.Rngs(0)), nnx.Param, ...)
    return Model(fn=lambda params, ids: nnx.merge(graph, params, rest)(ids), params=params)


class EquinoxModel(eqx.Module):
    wte: eqx.nn.Embedding
    parts: dict[str, Any]

    def __call__(self, ids):
        part = lambda layer, name, x: jax.vmap(self.parts[name])(x)
        return transformer(part, jax.vmap(self.wte)(ids), ['only'])


@MODELS
def equinox() -> Model:
    """One block of one example, under `vmap`; kernels are transposed."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    sizes = {**SIZES, 'head': (WIDTH, OUT)}
    parts: dict[str, Any] = {
        name: eqx.nn.Linear(*size, key=next(keys)) for name, size in sizes.items()
    }
    parts |= {name: eqx.nn.LayerNorm(WIDTH) for name in ('norm', 'last_norm')}
    model = EquinoxModel(eqx.nn.Embedding(VOCABULARY, WIDTH, key=next(keys)), parts)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def fn(params, ids):
        return jax.vmap(eqx.combine(params, static))(ids)

    return Model(fn=fn, params=params)


@MODELS
def encoder() -> Model:
    """The zoo's BERT."""
    config = models.EncoderConfig(
        model_type='bert',
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=16,
    )
    model = models.Encoder(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)['params']
    params = jax.tree.map(lambda s: 0.5 * normal(sum(s.shape), *s.shape), shapes)
    return Model(fn=model.apply_fn, params=params)


EXPERT_PARAMETERS = {
    'up': {'kernel': normal(1, 2, WIDTH, INNER, fan=WIDTH), 'bias': normal(2, 2, INNER)},
    'down': {'kernel': normal(3, 2, INNER, WIDTH, fan=INNER)},
}


@MODELS
def experts() -> Model:
    """Each token goes to both experts."""

    def fn(params, ids):
        x = params['wte']['embedding'][ids].reshape(-1, WIDTH)
        h = jnp.einsum('etd,edf->etf', jnp.stack([x, jnp.tanh(x)]), params['up']['kernel'])
        h = jax.nn.gelu(h + params['up']['bias'][:, None])
        y = jnp.einsum('edf,etd->etf', params['down']['kernel'], h)
        return module(params['head'], y.sum(0).reshape(*ids.shape, WIDTH))

    return Model(fn=fn, params={**_around(), **EXPERT_PARAMETERS})


@MODELS
def ragged() -> Model:
    """The first four tokens go to one expert, the others to another."""

    def fn(params, ids):
        x = params['wte']['embedding'][ids].reshape(-1, WIDTH)
        sizes = jnp.array([4, x.shape[0] - 4], jnp.int32)
        h = lax.ragged_dot(x, params['up']['kernel'], sizes)
        y = lax.ragged_dot(jax.nn.gelu(h), params['down']['kernel'], sizes)
        return module(params['head'], y.reshape(*ids.shape, WIDTH))

    kernels = {name: {'kernel': EXPERT_PARAMETERS[name]['kernel']} for name in ('up', 'down')}
    return Model(fn=fn, params={**_around(), **kernels})


@MODELS
def convolution() -> Model:
    """A convolution over tokens, grouped, between an embedding and a head."""

    def fn(params, ids):
        x = params['wte']['embedding'][ids]
        how = {'dimension_numbers': ('NWC', 'WIO', 'NWC'), 'feature_group_count': 2}
        x = lax.conv_general_dilated(x, params['up']['kernel'], (1,), 'SAME', **how)
        return module(params['head'], jax.nn.gelu(x + params['up']['bias'][None, None]))

    up = {'kernel': normal(1, 3, WIDTH // 2, WIDTH, fan=12), 'bias': normal(2, WIDTH)}
    return Model(fn=fn, params={**_around(), 'up': up})
