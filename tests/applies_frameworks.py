"""The zoo, third wing: models of linen, nnx, Equinox and Haiku, and odd calls."""

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from zoo import APPLIES, TOKENS, Case, X, normal

SEQUENCE = normal(0, 2, 3, 8)


def linen(module: nn.Module, *args: Any, **more: Any) -> Case:
    """A linen module with random params."""
    params = jax.tree.map(
        lambda s: normal(5, *s.shape, fan=4),
        jax.eval_shape(module.init, jax.random.key(0), *args)['params'],
    )
    more = {'target': 'kernel|embedding', **more}
    return Case(
        fn=lambda p, *args, **kwargs: module.apply({'params': p}, *args, **kwargs),
        params=params,
        args=args,
        **more,
    )


@APPLIES
def linen_dense() -> Case:
    return linen(nn.Sequential([nn.Dense(5), nn.gelu, nn.Dense(4)]), X)


@APPLIES
def linen_bfloat16() -> Case:
    return linen(nn.Dense(5, dtype=jnp.bfloat16), X, tolerance=3e-2)


@APPLIES
def linen_conv() -> Case:
    return linen(nn.Conv(4, (3, 2), strides=(2, 1)), normal(0, 2, 5, 4, 3))


@APPLIES
def linen_embed() -> Case:
    return linen(nn.Embed(7, 4), TOKENS)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 4)
        return embed.attend(nn.LayerNorm()(embed(tokens)))


@APPLIES
def linen_tied() -> Case:
    return linen(Tied(), TOKENS)


@APPLIES
def linen_attention() -> Case:
    return linen(nn.MultiHeadDotProductAttention(num_heads=2), SEQUENCE)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(8)(nn.silu(nn.Dense(6)(nn.RMSNorm()(x))))


class Scanned(nn.Module):
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={'params': self.axis},
            split_rngs={'params': True},
            length=2,
        )
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return layers(nn.remat(Block, policy=policy)(name='layers'), x, None)[0]


@APPLIES
def linen_scan_remat() -> Case:
    return linen(Scanned(), SEQUENCE)


@APPLIES
def linen_scan_axis_1() -> Case:
    return linen(Scanned(axis=1), SEQUENCE)


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool, mode: str = 'plain'):
        x = nn.Dense(5)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return {'plain': x, 'double': 2 * x}[mode]


@APPLIES
def static_arguments() -> Case:
    def fn(p, x, train, act=None, extra=None, **kwargs):
        assert train is False and act is jnp.tanh and extra is None
        return act(Noisy().apply({'params': p}, x, train, **kwargs))

    return Case(
        fn=fn,
        params={'Dense_0': {'kernel': normal(2, 6, 5, fan=6), 'bias': normal(3, 5)}},
        args=(X, False),
        kwargs={'act': jnp.tanh, 'mode': 'double', 'extra': None},
        target='kernel',
    )


@APPLIES
def rngs() -> Case:
    def fn(p, x, rngs):
        return Noisy().apply({'params': p}, x, True, rngs=rngs)

    return Case(
        fn=fn,
        params={'Dense_0': {'kernel': normal(2, 6, 5, fan=6), 'bias': normal(3, 5)}},
        args=(X,),
        kwargs={'rngs': {'dropout': jax.random.key(1)}},
        target='kernel',
    )


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(5)(x))


@APPLIES
def mutable_collections() -> Case:
    variables = Normed().init(jax.random.key(0), X)

    def fn(p, x, stats, mutable):
        return Normed().apply({'params': p, 'batch_stats': stats}, x, mutable=mutable)

    return Case(
        fn=fn,
        params=variables['params'],
        args=(X, variables['batch_stats']),
        kwargs={'mutable': ['batch_stats']},
        target='kernel',
        tolerance=1e-4,
        notes='the norm of three rows amplifies rounding',
    )


@APPLIES
def whole_variables() -> Case:
    variables = Normed().init(jax.random.key(0), X)
    return Case(
        fn=lambda v, x: Normed().apply(v, x, mutable=['batch_stats']),
        params=variables,
        args=(X,),
        target='params/.*kernel',
        tolerance=1e-4,
        notes='params is the dict of all collections',
    )


@APPLIES
def pytree_output() -> Case:
    def fn(p, x):
        h = x @ p['w']
        return {'hidden': (h, [h.sum(), None]), 'ids': h.argmax(-1), 'mask': h > 0}

    return Case(fn=fn, params={'w': normal(2, 6, 4, fan=6)}, args=(X,))


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(7, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.norm(self.embed(tokens)))


@APPLIES
def nnx_split_merge() -> Case:
    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def fn(params, tokens):
        return nnx.merge(graph, params, rest)(tokens)

    return Case(fn=fn, params=params, args=(TOKENS,), target='kernel|embedding')


@APPLIES
def equinox() -> Case:
    keys = jax.random.split(jax.random.key(0), 2)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Linear(6, 5, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Linear(5, 4, key=keys[1]),
        ]
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    return Case(fn=fn, params=params, args=(X,), target='weight')


@APPLIES
def haiku() -> Case:
    params = {
        'mlp/~/linear_0': {'w': normal(2, 6, 5, fan=6), 'b': normal(3, 5)},
        'mlp/~/linear_1': {'w': normal(4, 5, 4, fan=5)},
    }

    def fn(params, rng, x):
        assert rng is None
        first, second = params.values()
        return jax.nn.relu(x @ first['w'] + first['b'][None]) @ second['w']

    return Case(
        fn=lambda p, x, rng: fn(p, rng, x), params=params, args=(X, None), target=r'~/linear_\d/w'
    )


@APPLIES
def tuple_params() -> Case:
    return Case(
        fn=lambda p, x: jnp.tanh(x @ p[0]) @ p[1],
        params=(normal(2, 6, 5, fan=6), normal(3, 5, 4, fan=5)),
        args=(X,),
        target='0|1',
    )


@APPLIES
def single_array() -> Case:
    return Case(fn=lambda w, x: x @ w, params=normal(2, 6, 4, fan=6), args=(X,))


@APPLIES
def loss() -> Case:
    def fn(p, batch):
        return jnp.mean((batch['x'] @ p['w'] - batch['y']) ** 2)

    return Case(
        fn=fn,
        params={'w': normal(2, 6, 4, fan=6)},
        args=({'x': X, 'y': normal(3, 3, 4)},),
    )
