import jax
import jax.numpy as jnp
import numpy as np
import pytest
from applies import APPLIES
from blocks import MODELS
from zoo import normal

import peftjax as pj

X = normal(0, 3, 6)
PARAMS = {'up': {'kernel': normal(1, 6, 4), 'bias': normal(2, 4)}}
WIDE, DEEP = normal(3, 4), normal(4, 6)


def dense(params, x):
    return jnp.tanh(x @ params['up']['kernel'] + params['up']['bias'][None])


def test_the_bias_is_scaled_with_the_output():
    peft = pj.attach(pj.Ia3(target='kernel'), dense, PARAMS, X)
    assert peft.sites[0][0].bias == ('up/bias',)
    phi = {'up/kernel': {'l': WIDE}}
    y = X @ PARAMS['up']['kernel'] + PARAMS['up']['bias']
    np.testing.assert_allclose(peft.wrap(dense)(PARAMS, phi, X), jnp.tanh(WIDE * y), atol=1e-6)
    merged = peft.merge(PARAMS, phi)['up']
    np.testing.assert_array_equal(merged['bias'], WIDE * PARAMS['up']['bias'])
    np.testing.assert_array_equal(merged['kernel'], WIDE * PARAMS['up']['kernel'])


def test_the_input_is_scaled_where_it_feeds_forward():
    peft = pj.attach(pj.Ia3(target='kernel', feedforward='up'), dense, PARAMS, X)
    phi = {'up/kernel': {'l': DEEP}}
    y = (DEEP * X) @ PARAMS['up']['kernel'] + PARAMS['up']['bias']
    np.testing.assert_allclose(peft.wrap(dense)(PARAMS, phi, X), jnp.tanh(y), atol=1e-6)
    merged = peft.merge(PARAMS, phi)['up']
    np.testing.assert_array_equal(merged['bias'], PARAMS['up']['bias'])
    np.testing.assert_array_equal(merged['kernel'], DEEP[:, None] * PARAMS['up']['kernel'])


@pytest.mark.parametrize('model', ['plain', 'scanned', 'linen', 'flax_nnx', 'equinox', 'encoder'])
def test_every_model_tells_the_biases_of_its_layers(model):
    case = MODELS[model]
    target = '(query|key|value|out|up|down|dense)/[kw]'
    peft = pj.attach(pj.Ia3(target=target), case.fn, case.params, case.inputs)
    assert all(site.bias == (f'{site.path.rpartition("/")[0]}/bias',) for site in peft.sites[0])
    fresh = peft.init(jax.random.key(0), case.params)
    phi = {path: {'l': normal(i, *f['l'].shape)} for i, (path, f) in enumerate(fresh.items())}
    out = jax.jit(case.fn)(peft.merge(case.params, phi), case.inputs)
    forward = jax.jit(peft.wrap(case.fn))(case.params, phi, case.inputs)
    np.testing.assert_allclose(forward, out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('model', 'shapes'),
    [
        ('scanned', {'key': (2, 8), 'down': (2, 12)}),
        ('linen', {'key': (2, 2, 4), 'down': (2, 12)}),
        ('flax_nnx', {'key': (2, 4), 'down': (12,)}),
        ('equinox', {'key': (8,), 'down': (12,)}),
        ('experts', {'up': (2, 12), 'down': (2, 12)}),
    ],
)
def test_shapes_of_phi(model, shapes):
    case = MODELS[model]
    target = tuple(f'{name}/(kernel|weight)' for name in shapes)
    peft = pj.attach(pj.Ia3(target=target, feedforward='down'), case.fn, case.params, case.inputs)
    phi = peft.init(jax.random.key(0), case.params)
    found = {path.split('/')[-2]: arrays['l'].shape for path, arrays in phi.items()}
    assert found == shapes
    assert all((arrays['l'] == 1).all() for arrays in phi.values())


def test_the_bias_of_heads_may_be_flat():
    params = {'q': {'kernel': normal(1, 6, 2, 4), 'bias': normal(2, 8)}}

    def fn(params, x):
        q = jnp.einsum('td,dhk->thk', x, params['q']['kernel'])
        return q.reshape(3, 8) + params['q']['bias'][None]

    peft = pj.attach(pj.Ia3(target='kernel'), fn, params, X)
    phi = {'q/kernel': {'l': normal(3, 2, 4)}}
    wanted = fn(params, X) * phi['q/kernel']['l'].reshape(8)
    np.testing.assert_allclose(peft.wrap(fn)(params, phi, X), wanted, atol=1e-5)
    np.testing.assert_allclose(fn(peft.merge(params, phi), X), wanted, atol=1e-5)


SQUARE = {
    'w': normal(1, 4, 4),
    'v': normal(2, 4, 4),
    'b': normal(3, 4),
    'two': normal(4, 8),
    'deep': normal(5, 2, 4, 4),
    'biases': normal(6, 2, 4),
    'heads': normal(7, 4, 4, 4),
    'table': normal(8, 4, 4),
    'long': normal(9, 16),
    'kernel': normal(10, 4, 4, 1, 1),
}
ORDER = jnp.array([1, 0, 3, 2])


def half(params, i):
    return params['two'][4 * i : 4 * i + 4][None]


def heads(params, x, out):
    return jnp.einsum(f'td,dhk->{out}', x, params['heads'])


def convolved(params, x):
    return jax.lax.conv(x[None, :, :, None], params['kernel'], (1, 1), 'SAME')


def stacked(params, x):
    layer = lambda x, w: (jnp.tanh(x @ w + params['b'][None]), None)
    return jax.lax.scan(layer, x, params['deep'])[0]


UNLIKE = {
    'elsewhere': lambda p, x: jnp.tanh(x @ p['w'] + p['b'][None]) * p['b'][None],
    'subtracted': lambda p, x: (x @ p['w'] + p['b'][None]) + (x @ p['w'] - p['b'][None]),
    'in two layers': lambda p, x: jnp.tanh(x @ p['w'] + p['b'][None]) @ p['v'] + p['b'][None],
    'across': lambda p, x: (x @ p['w'] + p['b'][None]) + (x @ p['v'] + p['b'][:, None]),
    'scaled': lambda p, x: x @ p['w'] + 2 * p['b'][None],
    'shifted': lambda p, x: x @ p['w'] + (1 + p['b'][None]),
    'divided': lambda p, x: x @ p['w'] + p['b'][None] / 3,
    'a column': lambda p, x: x @ p['w'] + p['b'][:, None],
    'permuted': lambda p, x: x @ p['w'] + p['b'][ORDER][None],
    'in parts': lambda p, x: jnp.tanh(x @ p['w'] + half(p, 0)) @ p['v'] + half(p, 1),
    'of another layer': lambda p, x: x @ p['deep'][0] + p['biases'][1][None],
    'of all layers': stacked,
    'the wrong way round': lambda p, x: heads(p, x, 'tkh') + p['table'][None],
    'along mixed outputs': lambda p, x: heads(p, x[:1], 'tkh').reshape(16) + p['long'],
}
LIKE = {
    'a column': lambda p, x: p['w'] @ x + p['b'][:, None],
    'vmapped': lambda p, x: jax.vmap(lambda x: p['w'] @ x + p['b'])(x),
    'of heads': lambda p, x: heads(p, x, 'thk') + p['table'][None],
    'transposed': lambda p, x: heads(p, x, 'thk') + p['table'].T[None],
    'twice': lambda p, x: x @ p['w'] + p['b'][None] + p['b'][None],
    'layer by layer': lambda p, x: (
        jnp.tanh(x @ p['deep'][0] + p['biases'][0][None]) @ p['deep'][1] + p['biases'][1][None]
    ),
    'of a convolution': lambda p, x: convolved(p, x) + p['b'][None, :, None, None],
}


def scaled(fn):
    """The plan of a function of a square matrix, and what its merge and its forward yield."""
    x = normal(11, 4, 4)
    peft = pj.attach(pj.Ia3(target='^(w|v|deep|heads|kernel)$'), fn, SQUARE, x)
    fresh = peft.init(jax.random.key(0), SQUARE)
    phi = {path: {'l': normal(i, *f['l'].shape)} for i, (path, f) in enumerate(fresh.items())}
    return peft, lambda: fn(peft.merge(SQUARE, phi), x), peft.wrap(fn)(SQUARE, phi, x)


@pytest.mark.parametrize('fn', UNLIKE.values(), ids=list(UNLIKE))
def test_what_is_no_bias_of_one_layer_alone_is_not_scaled_with_it(fn):
    peft, merged, forward = scaled(fn)
    if any(site.bias_shared for site in peft.sites[0]):
        with pytest.raises(ValueError, match="'b', the bias of '[wv]', is used by something else"):
            merged()
    else:
        assert not any(site.bias for site in peft.sites[0])
        np.testing.assert_allclose(merged(), forward, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('fn', LIKE.values(), ids=list(LIKE))
def test_a_bias_is_known_however_it_lies(fn):
    peft, merged, forward = scaled(fn)
    assert all(site.bias and not site.bias_shared for site in peft.sites[0])
    np.testing.assert_allclose(merged(), forward, rtol=1e-4, atol=1e-5)


def test_what_is_no_bias_is_none_where_it_is_quantized_either():
    params = {'up': normal(1, 6, 4), 'places': normal(2, 3, 4)}
    fn = lambda params, x: jnp.tanh(x @ params['up'] + params['places'])
    rounded = pj.quantize(params, pj.INT8, target='places')
    outs = []
    for base in (rounded, pj.dequantize(rounded)):
        peft = pj.attach(pj.Ia3(target='up'), fn, base, X)
        assert peft.sites[0][0].bias == ()
        outs.append(peft.wrap(fn)(base, {'up': {'l': WIDE}}, X))
    np.testing.assert_allclose(*outs, atol=1e-6)
    pj.attach(pj.chain(pj.Lora(rank=2, target='places'), pj.Ia3(target='up')), fn, params, X)


@pytest.mark.parametrize('drop', [lambda y: y[0], lambda y: jnp.squeeze(y, 0)[None]])
def test_a_dimension_of_one_comes_and_goes_before_the_bias(drop):
    fn = lambda params, x: drop(x[None] @ params['up']['kernel']) + params['up']['bias']
    peft, phi = pj.attach(pj.Ia3(target='kernel'), fn, PARAMS, X), {'up/kernel': {'l': WIDE}}
    assert peft.sites[0][0].bias == ('up/bias',)
    out = peft.wrap(fn)(PARAMS, phi, X)
    np.testing.assert_allclose(out, WIDE * fn(PARAMS, X), atol=1e-6)
    np.testing.assert_allclose(out, fn(peft.merge(PARAMS, phi), X), atol=1e-6)


def test_what_cannot_be_adapted():
    with pytest.raises(ValueError, match="no site of target matches feedforward='down'"):
        pj.attach(pj.Ia3(target='kernel', feedforward='down'), dense, PARAMS, X)
    case = APPLIES['conv_nhwc']
    with pytest.raises(ValueError, match="input of a convolution cannot be scaled .*'w'"):
        pj.attach(pj.Ia3(target='w', feedforward='w'), case.fn, case.params, *case.args)
    case = APPLIES['both_ways']
    with pytest.raises(ValueError, match=r"'w' is used in two ways \(linear and linear\)"):
        pj.attach(pj.Ia3(target='w'), case.fn, case.params, *case.args)


def test_merge_refuses_a_leaf_with_other_uses():
    case = APPLIES['tied']  # a lookup is no site of IA3, the head is
    peft = pj.attach(pj.Ia3(target='w'), case.fn, case.params, *case.args)
    phi = {'w': {'l': normal(3, 7)}}
    wanted = case.fn(case.params, *case.args) * phi['w']['l']
    np.testing.assert_allclose(peft.wrap(case.fn)(case.params, phi, *case.args), wanted, atol=1e-5)
    with pytest.raises(ValueError, match="'w' is used in several ways.*Keep phi"):
        peft.merge(case.params, phi)
