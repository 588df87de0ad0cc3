import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from applies import APPLIES
from blocks import MODELS
from jax.ad_checkpoint import checkpoint_name
from zoo import normal

import peftjax as pj

X = normal(0, 2, 5, 6)
PARAMS = {'up': {'kernel': normal(1, 6, 4), 'bias': normal(2, 4)}}
METHOD = pj.Adapter(target='kernel', reduction=2)


def dense(params, x):
    return x @ params['up']['kernel'] + params['up']['bias'][None, None]


def noisy(peft, params):
    """A phi of which no number is zero."""
    draw = np.random.default_rng(3)
    fresh = peft.init(jax.random.key(0), params)
    return jax.tree.map(lambda a: a + jnp.asarray(draw.normal(size=a.shape), a.dtype), fresh)


def normalized(x, scale, bias):
    variance = np.var(x, -1, keepdims=True)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(variance + 1e-5) * scale + bias


ACTIVATIONS = {
    'relu': lambda x: np.maximum(x, 0),
    'identity': lambda x: x,
    'tanh': np.tanh,
    'silu': lambda x: x / (1 + np.exp(-x)),
    'gelu': lambda x: np.asarray(jax.nn.gelu(x, approximate=False)),
    'gelu_tanh': lambda x: np.asarray(jax.nn.gelu(x)),
}


def formula(y, phi, method):
    """Section 2 of Houlsby et al., with the options of later work."""
    phi = jax.tree.map(np.asarray, phi)
    z = y
    if method.norm in ('before', 'both'):
        z = normalized(z, phi['before_scale'], phi['before_bias'])
    h = ACTIVATIONS[method.activation](z @ phi['down'] + phi['down_bias'])
    scale = phi['scale'] if isinstance(method.scale, str) else method.scale
    u = (h @ phi['up'] + phi['up_bias']) * scale
    if method.gate:
        opening = 1 / (1 + np.exp(-(y @ phi['gate'] + phi['gate_bias'])))
        u = u * opening.mean(1, keepdims=True)
    out = y + u
    if method.norm in ('after', 'both'):
        out = normalized(out, phi['after_scale'], phi['after_bias'])
    return out


@pytest.mark.parametrize(
    'fields',
    [
        *({'activation': name} for name in ACTIVATIONS),
        {'scale': 4.0},
        {'scale': 'learned'},
        {'scale': 'channel'},
        {'norm': 'before'},
        {'norm': 'after'},
        {'norm': 'both', 'scale': 0.5},
        {'gate': True},
        {'gate': True, 'norm': 'before', 'scale': 'learned', 'activation': 'silu'},
    ],
    ids=str,
)
def test_every_option(fields):
    method = dataclasses.replace(METHOD, **fields)
    peft = pj.attach(method, dense, PARAMS, X)
    phi = noisy(peft, PARAMS)
    wanted = formula(np.asarray(dense(PARAMS, X)), phi['up/kernel'], method)
    np.testing.assert_allclose(peft.wrap(dense)(PARAMS, phi, X), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('fields', 'more'),
    [
        ({}, {}),
        ({'scale': 'learned'}, {'scale': ()}),
        ({'scale': 'channel'}, {'scale': (4,)}),
        ({'norm': 'before'}, {'before_scale': (4,), 'before_bias': (4,)}),
        ({'norm': 'after'}, {'after_scale': (4,), 'after_bias': (4,)}),
        ({'gate': True}, {'gate': (4, 1), 'gate_bias': (1,)}),
        ({'reduction': 100}, {'down': (4, 1), 'down_bias': (1,), 'up': (1, 4)}),
        ({'reduction': 0.5}, {'down': (4, 8), 'down_bias': (8,), 'up': (8, 4)}),
        ({'reductions': (('up', 1),)}, {'down': (4, 4), 'down_bias': (4,), 'up': (4, 4)}),
    ],
    ids=str,
)
def test_phi_of_every_option(fields, more):
    peft = pj.attach(dataclasses.replace(METHOD, **fields), dense, PARAMS, X)
    plain = {'down': (4, 2), 'down_bias': (2,), 'up': (2, 4), 'up_bias': (4,)}
    phi = peft.init(jax.random.key(0), PARAMS)
    assert jax.tree.map(jnp.shape, phi) == {'up/kernel': {**plain, **more}}


@pytest.mark.parametrize(
    ('model', 'target', 'down', 'up'),
    [
        ('scanned', 'down/kernel', (2, 8, 4), (2, 4, 8)),
        ('linen', 'query/kernel', (2, 2, 4, 4), (2, 4, 2, 4)),
        ('flax_nnx', 'query/kernel', (2, 4, 4), (4, 2, 4)),
        ('experts', 'up/kernel', (2, 12, 6), (2, 6, 12)),
        ('ragged', 'up/kernel', (2, 12, 6), (2, 6, 12)),
        ('convolution', 'up/kernel', (8, 4), (4, 8)),
        ('plain', 'wte', (8, 4), (4, 8)),
        ('scanned', '@mlp_output', (2, 8, 4), (2, 4, 8)),
    ],
)
def test_phi_covers_the_outputs_whole(model, target, down, up):
    case = MODELS[model]
    method = pj.Adapter(target=target, reduction=2)
    peft = pj.attach(method, case.fn, case.params, case.inputs)
    (phi,) = peft.init(jax.random.key(0), case.params).values()
    assert (phi['down'].shape, phi['up'].shape) == (down, up)


def test_heads_are_one_vector():
    """A kernel of three dimensions is the same as the flat one."""
    params = {'q': normal(1, 6, 2, 4)}
    heads = lambda params, x: jnp.einsum('btd,dhk->bthk', x, params['q'])
    flat = lambda params, x: x @ params['q']
    for fields in ({}, {'norm': 'both', 'gate': True, 'scale': 'learned'}, {'scale': 'channel'}):
        method = pj.Adapter(target='q', reduction=4, **fields)
        peft = pj.attach(method, heads, params, X)
        phi = noisy(peft, params)['q']
        out = peft.wrap(heads)(params, {'q': phi}, X).reshape(2, 5, 8)
        for name in ('down', 'up', 'up_bias', 'gate'):
            if name in phi:
                extra = {'down': (2,), 'gate': (1,)}.get(name, ())
                lead = (2,) if name == 'up' else ()
                phi[name] = phi[name].reshape(*lead, 8, *extra)
        for name, leaf in phi.items():
            if name.startswith(('before', 'after')) or (name == 'scale' and leaf.ndim):
                phi[name] = leaf.reshape(8)
        short = {'q': params['q'].reshape(6, 8)}
        peft = pj.attach(method, flat, short, X)
        np.testing.assert_allclose(out, peft.wrap(flat)(short, {'q': phi}, X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('scale', [2.0, 'learned', 'channel'])
@pytest.mark.parametrize('gate', [False, True])
def test_every_expert_has_its_own_network(scale, gate):
    case = APPLIES['experts']
    method = pj.Adapter(target='w', reduction=2, scale=scale, norm='before', gate=gate)
    peft = pj.attach(method, case.fn, case.params, case.x)
    phi = noisy(peft, case.params)
    out = peft.wrap(case.fn)(case.params, phi, case.x)
    for e in range(2):
        w, mine = case.params['w'][e], jax.tree.map(lambda leaf, e=e: leaf[e], phi)
        linear = lambda params, x: x @ params['w']
        # each row of an expert counts for itself
        x = case.x[e][:, None]
        alone = pj.attach(method, linear, {'w': w}, x)
        wanted = alone.wrap(linear)({'w': w}, mine, x)[:, 0]
        np.testing.assert_allclose(out[e], wanted, rtol=1e-4, atol=1e-5)


def test_ragged_rows_meet_the_network_of_their_expert():
    case = APPLIES['ragged']
    method = pj.Adapter(target='w', reduction=2, scale='learned', norm='both')
    peft = pj.attach(method, case.fn, case.params, *case.args)
    phi = noisy(peft, case.params)
    out = peft.wrap(case.fn)(case.params, phi, *case.args)
    expert = np.repeat(np.arange(3), case.args[1])
    for row, e in enumerate(expert):
        mine = jax.tree.map(lambda leaf, e=e: leaf[e], phi['w'])
        y = np.asarray(case.x[row] @ case.params['w'][e])
        np.testing.assert_allclose(out[row], formula(y, mine, method), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['conv_nhwc', 'conv_nchw', 'conv_1d', 'conv_grouped'])
def test_a_convolution_has_a_network_over_its_features(name):
    case = APPLIES[name]
    method = pj.Adapter(target='w', reduction=2, scale='channel', norm='before', gate=True)
    peft = pj.attach(method, case.fn, case.params, *case.args)
    phi = noisy(peft, case.params)
    y, out = case.fn(case.params, *case.args), peft.wrap(case.fn)(case.params, phi, *case.args)
    last = lambda a: np.asarray(jnp.moveaxis(a, 1, -1) if name == 'conv_nchw' else a)
    rows = last(y).reshape(2, -1, y.shape[1 if name == 'conv_nchw' else -1])
    wanted = formula(rows, phi['w'], method).reshape(last(y).shape)
    np.testing.assert_allclose(last(out), wanted, rtol=1e-3, atol=1e-4)


def test_the_gate_does_not_mix_examples():
    flat = lambda params, x: x @ params['up']['kernel']
    peft = pj.attach(dataclasses.replace(METHOD, gate=True), flat, PARAMS, X[:, 0])
    phi = noisy(peft, PARAMS)
    both = peft.wrap(flat)(PARAMS, phi, X[:, 0])
    np.testing.assert_allclose(both[:1], peft.wrap(flat)(PARAMS, phi, X[:1, 0]), rtol=1e-5)


def test_the_network_stands_after_the_bias():
    peft = pj.attach(METHOD, dense, PARAMS, X)
    phi = jax.tree.map(jnp.ones_like, peft.init(jax.random.key(0), PARAMS))
    deep = {'up': {**PARAMS['up'], 'bias': PARAMS['up']['bias'] + 1}}
    y = np.asarray(dense(deep, X))
    np.testing.assert_allclose(
        peft.wrap(dense)(deep, phi, X), formula(y, phi['up/kernel'], METHOD), rtol=1e-5
    )


def named(params, x):
    """Two post-norm layers that name their streams."""
    for w in params['w']:
        x = checkpoint_name(x, 'stream')
        y = checkpoint_name(jnp.tanh(x @ w), 'made')
        x = checkpoint_name(2 * (x + y), 'after')
    return x


NAMED, STREAM = {'w': normal(1, 2, 4, 4)}, normal(2, 2, 5, 4)


@pytest.mark.parametrize('source', ['', '@stream', '@after'])
def test_what_the_network_reads(source):
    method = pj.Adapter(target='@made', source=source, reduction=2, scale=2.0)
    peft = pj.attach(method, named, NAMED, STREAM)
    phi = noisy(peft, NAMED)
    assert set(phi) == {'@made/0', '@made/1'}
    x = np.asarray(STREAM)
    for i in range(2):
        y = np.tanh(x @ np.asarray(NAMED['w'][i]))
        read = {'': y, '@stream': x, '@after': 2 * (x + y)}[source]
        u = formula(read, phi[f'@made/{i}'], method) - read
        x = 2 * (x + y + u)
    np.testing.assert_allclose(peft.wrap(named)(NAMED, phi, STREAM), x, rtol=1e-4, atol=1e-4)


def test_presets_are_the_placements_of_the_papers():
    case = MODELS['encoder']
    places = {
        pj.HOULSBY: {'@attention_output', '@mlp_output'},
        pj.PFEIFFER: {'@mlp_output'},
        pj.PARALLEL: {'@mlp_output'},
        pj.SCALED_PARALLEL: {'@mlp_output'},
    }
    for preset, paths in places.items():
        peft = pj.attach(preset, case.fn, case.params, case.inputs)
        phi = peft.init(jax.random.key(0), case.params)
        assert set(phi) == paths
        assert ('scale' in phi['@mlp_output']) == (preset is pj.SCALED_PARALLEL)
    assert (pj.PARALLEL.scale, pj.PARALLEL.source) == (4.0, '@attention_residual')


def test_reductions_by_place():
    case = MODELS['plain']
    method = dataclasses.replace(pj.HOULSBY, reduction=8, reductions=(('@mlp_output/1', 2),))
    peft = pj.attach(method, case.fn, case.params, case.inputs)
    phi = peft.init(jax.random.key(0), case.params)
    widths = {path: arrays['down_bias'].size for path, arrays in phi.items()}
    assert widths == {
        '@attention_output/0': 1,
        '@attention_output/1': 1,
        '@mlp_output/0': 1,
        '@mlp_output/1': 4,
    }


@pytest.mark.parametrize(
    ('initial', 'deviation', 'largest'),
    [('identity', 100**-0.5 / 3**0.5, 0.1), ('bert', 0.02, 0.12), ('houlsby', 0.0088, 0.02)],
)
def test_initial_weights(initial, deviation, largest):
    fn = lambda params, x: x @ params['kernel']
    params = {'kernel': jnp.ones((2, 100))}
    method = pj.Adapter(target='kernel', reduction=2, initial=initial, gate=True)
    peft = pj.attach(method, fn, params, jnp.ones((3, 4, 2)))
    phi = peft.init(jax.random.key(0), params)['kernel']
    assert abs(float(phi['down'].std()) - deviation) < 0.05 * deviation
    assert jnp.abs(phi['down']).max() <= largest and jnp.abs(phi['gate']).max() <= largest
    assert bool(phi['up'].any()) == (initial != 'identity')
    assert not any(phi[name].any() for name in ('down_bias', 'up_bias', 'gate_bias'))
    assert method.identity == ('exact' if initial == 'identity' else 'no')


@pytest.mark.parametrize(
    ('fields', 'match'),
    [
        ({'activation': 'gelo'}, "activation must be one of .*'gelu'.*; got 'gelo'"),
        ({'norm': 'middle'}, "norm must be one of .*; got 'middle'"),
        ({'initial': 'zero'}, "initial must be one of .*; got 'zero'"),
        ({'scale': 'free'}, "scale must be a number or one of .*; got 'free'"),
        ({'scale': float('nan')}, 'scale must be a finite number; got nan'),
        ({'scale': None}, 'scale must be a finite number; got None'),
        ({'scale': [1]}, r'scale must be a finite number; got \[1\]'),
        ({'dtype': 'int8'}, "dtype must be a floating one, .*; got 'int8'"),
        ({'reductions': ('w', 2)}, r"reductions must be pairs, .*; got \('w', 2\)"),
        ({'reduction': 0}, 'a reduction must be positive; got 0'),
        ({'reductions': (('w', -1),)}, 'a reduction must be positive; got -1'),
        ({'source': 'stream'}, "source must be a named value, @name; got 'stream'"),
    ],
)
def test_fields_out_of_range(fields, match):
    with pytest.raises(ValueError, match=f'Adapter: {match}'):
        pj.Adapter(target='kernel', **fields)


@pytest.mark.parametrize(
    ('fields', 'match'),
    [
        ({'target': '@made', 'source': '@streem'}, "there is no 'streem' there. Name it with"),
        ({'target': '@maid'}, "no site matches target='@maid'. .*'@made/0'"),
        ({'target': '@made', 'reductions': (('@mad', 2),)}, "reductions: '@mad' matches none of"),
    ],
)
def test_what_is_not_there(fields, match):
    with pytest.raises(ValueError, match=match):
        pj.attach(pj.Adapter(reduction=2, **fields), named, NAMED, STREAM)


def test_a_source_of_another_shape():
    def fn(params, x):
        return checkpoint_name(checkpoint_name(x, 'wide') @ params['w'], 'made')

    params = {'w': normal(1, 6, 4)}
    method = pj.Adapter(target='@made', source='@wide', reduction=2)
    with pytest.raises(ValueError, match=r"@wide has \(2, 5, 6\), '@made' \(2, 5, 4\)"):
        pj.attach(method, fn, params, X)


def test_merge_refuses():
    peft = pj.attach(METHOD, dense, PARAMS, X)
    phi = peft.init(jax.random.key(0), PARAMS)
    with pytest.raises(ValueError, match=r"not linear: .*'up/kernel'\). Keep phi, or use Lora"):
        peft.merge(PARAMS, phi)
