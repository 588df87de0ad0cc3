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
