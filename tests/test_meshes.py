"""Sharded parameters and data on eight host devices, under Auto and Explicit mesh axes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from zoo import ids, normal

import peftjax as pj

VOCABULARY, WIDTH, INNER, HEADS = 32, 16, 64, 4
TOKENS = ids(0, VOCABULARY, 4, 6)
LAYERS = 2

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason='needs eight devices')
kinds = pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)

PARAMS = {
    'embed': normal(1, VOCABULARY, WIDTH),
    'layers': {
        'up': normal(2, LAYERS, WIDTH, INNER, fan=WIDTH),
        'down': normal(3, LAYERS, INNER, WIDTH, fan=INNER),
        'mix': normal(4, LAYERS, WIDTH, HEADS, WIDTH // HEADS, fan=WIDTH),
        'out': normal(5, LAYERS, HEADS, WIDTH // HEADS, WIDTH, fan=WIDTH),
    },
    'head': normal(6, VOCABULARY, WIDTH, fan=WIDTH),
}
SPECS = {
    'embed': P(None, 'model'),
    'layers': {
        'up': P(None, None, 'model'),
        'down': P(None, 'model', None),
        'mix': P(None, None, 'model', None),
        'out': P(None, 'model', None, None),
    },
    'head': P('model', None),
}


def model(params, tokens):
    """A lookup, scanned column- and row-parallel layers, and a head that is transposed."""
    data = jax.typeof(tokens).sharding.spec[:1] or (None,)
    placed = jax.typeof(params['embed']).sharding.mesh.are_all_axes_explicit
    whole = {'out_sharding': P(*data, None, None)} if placed else {}

    def layer(x, w):
        h = jax.nn.silu(jnp.einsum('btd,df->btf', x, w['up']))
        x = x + jnp.einsum('btf,fd->btd', h, w['down'], **whole)
        h = jnp.tanh(jnp.einsum('btd,dhk->bthk', x, w['mix']))
        return x + jnp.einsum('bthk,hkd->btd', h, w['out'], **whole), None

    x = params['embed'].at[tokens].get(**whole)
    x, _ = jax.lax.scan(layer, x, params['layers'])
    return x @ params['head'].T


def mesh_of(kind: AxisType):
    return jax.make_mesh((2, 4), ('data', 'model'), axis_types=(kind, kind))


def attached():
    peft = pj.attach(pj.Lora(rank=2, alpha=3.0, target='.*'), model, PARAMS, TOKENS)
    rng = np.random.default_rng(1)
    phi = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape) / 8, a.dtype),
        peft.init(jax.random.key(0), PARAMS),
    )
    return peft, phi


def sharded(mesh):
    place = lambda tree, specs: jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs
    )
    return place(PARAMS, SPECS), jax.device_put(TOKENS, NamedSharding(mesh, P('data', None)))


def loss(forward):
    return lambda phi, params, tokens: jnp.square(forward(params, phi, tokens)).mean()


def close(one, other):
    one, other = np.asarray(one), np.asarray(other)
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


@kinds
def test_forward_and_gradient_are_those_of_one_device(kind):
    peft, phi = attached()
    assert {way for _, ways in peft.served for way in ways} == {'efficient'}
    forward = jax.jit(peft.wrap(model))
    step = jax.jit(jax.value_and_grad(loss(forward)))
    logits, (value, slope) = forward(PARAMS, phi, TOKENS), step(phi, PARAMS, TOKENS)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        params, tokens = sharded(mesh)
        spread = jax.device_put(phi, NamedSharding(mesh, P()))
        there = forward(params, spread, tokens)
        close(there, logits)
        found, gradient = step(spread, params, tokens)
    assert there.sharding.spec[0] == 'data'
    close(found, value)
    jax.tree.map(close, gradient, slope)


@kinds
def test_merge_keeps_the_sharding_of_theta(kind):
    peft, phi = attached()
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        params, _ = sharded(mesh)
        merged = jax.jit(peft.merge)(params, jax.device_put(phi, NamedSharding(mesh, P())))
    jax.tree.map(close, merged, jax.jit(peft.merge)(PARAMS, phi))
    for one, other in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


@kinds
def test_no_weight_is_gathered(kind):
    """In a column-parallel layer only activations and factors may travel."""

    def layer(params, x):
        return jax.nn.silu(x @ params['w'])

    params = {'w': normal(0, 32, 128, fan=32)}
    x = normal(1, 2, 32)
    peft = pj.attach(pj.Lora(rank=2, target='w'), layer, params, x)
    phi = peft.init(jax.random.key(0), params)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, P(None, 'model')))
        spread = jax.device_put(phi, NamedSharding(mesh, P()))
        x = jax.device_put(x, NamedSharding(mesh, P('data', None)))
        step = jax.jit(jax.value_and_grad(loss(peft.wrap(layer))))
        text = step.lower(spread, params, x).compile().as_text()
    assert 'all-reduce' in text
    for shape in re.findall(r'= \w+\[([\d,]+)\]\S* all-gather', text):
        assert np.prod([int(n) for n in shape.split(',')]) < params['w'].size / 2


@kinds
def test_phi_may_be_sharded_along_theta(kind):
    peft, phi = attached()
    value = jax.jit(loss(peft.wrap(model)))(phi, PARAMS, TOKENS)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        params, tokens = sharded(mesh)
        spread = jax.device_put(phi, NamedSharding(mesh, P()))
        place = lambda leaf, *spec: jax.device_put(leaf, NamedSharding(mesh, P(*spec)))
        up, down = spread['layers/up'], spread['layers/down']
        spread['layers/up'] = {'a': up['a'], 'b': place(up['b'], None, None, 'model')}
        spread['layers/down'] = {'a': place(down['a'], None, 'model', None), 'b': down['b']}
        close(jax.jit(loss(peft.wrap(model)))(spread, params, tokens), value)


def test_an_inner_jit_keeps_its_shardings():
    mesh = mesh_of(AxisType.Auto)
    place = lambda *spec: NamedSharding(mesh, P(*spec))
    inner = jax.jit(
        lambda w, x: x @ w,
        in_shardings=(place(None, 'model'), place('data', None)),
        out_shardings=place('data', 'model'),
    )
    fn = lambda params, x: inner(params['w'], x)
    params, x = {'w': normal(0, 16, 64, fan=16)}, normal(1, 2, 16)
    peft = pj.attach(pj.Lora(rank=2, target='w'), fn, params, x)
    phi = jax.tree.map(lambda a: a + 0.1, peft.init(jax.random.key(0), params))
    y = jax.jit(peft.wrap(fn))(params, phi, x)
    assert y.sharding.is_equivalent_to(place('data', 'model'), 2)
    close(y, fn(peft.merge(params, phi), x))


def data_parallel(apply, mapped):
    """The gradient step of one device out of eight, as it was done before meshes."""

    def step(phi, params, x):
        value, slope = jax.value_and_grad(lambda phi: jnp.sin(apply(params, phi, x)).mean())(phi)
        return mapped(value), jax.tree.map(mapped, slope)

    return step


@pytest.mark.parametrize('way', ['shard_map', 'pmap'])
def test_a_step_works_inside_shard_map_and_pmap(way):
    def scanned(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    params, x = normal(0, 2, 6, 6, fan=6), normal(1, 8, 6)
    peft = pj.attach(pj.Lora(rank=2, target='.*'), scanned, params, x)
    phi = jax.tree.map(lambda a: a + 0.1, peft.init(jax.random.key(0), params))
    mean = lambda leaf: jax.lax.pmean(leaf, 'data')

    def run(apply):
        step = data_parallel(apply, mean)
        if way == 'pmap':
            step = jax.pmap(step, axis_name='data', in_axes=(None, None, 0), out_axes=None)
            return step(phi, params, x[:, None])
        mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
        specs = {'in_specs': (P(), P(), P('data')), 'out_specs': P()}
        return jax.jit(jax.shard_map(step, mesh=mesh, **specs))(phi, params, x)

    merged = lambda params, phi, x: scanned(peft.merge(params, phi), x)
    jax.tree.map(close, run(peft.wrap(scanned)), run(merged))
