"""BitFit, norm tuning and trainable leaves: which leaves they choose, and what phi holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from applies import APPLIES
from blocks import MODELS

import peftjax as pj

BIASES = {'query', 'key', 'value', 'out', 'up', 'down', 'norm', 'last_norm'}


def paths(method, model):
    case = MODELS[model]
    peft = pj.attach(method, case.fn, case.params, case.inputs)
    phi = peft.init(jax.random.key(0), case.params)
    leaves = pj._paths.leaves(case.params)
    for path, arrays in phi.items():
        np.testing.assert_array_equal(arrays['value'], leaves[path])
    return set(phi)


@pytest.mark.parametrize('model', ['plain', 'scanned', 'linen', 'flax_nnx', 'equinox', 'encoder'])
def test_bitfit_trains_what_is_called_bias_there(model):
    wanted = {path for path in pj._paths.leaves(MODELS[model].params) if path.endswith('bias')}
    unused = 'pooler/dense/bias'
    assert paths(pj.BitFit(), model) == wanted - {unused}


@pytest.mark.parametrize('model', ['plain', 'scanned', 'linen', 'flax_nnx', 'equinox', 'encoder'])
def test_norm_tuning_trains_norms(model):
    found = pj._paths.leaves(MODELS[model].params)
    wanted = {path for path in found if 'norm' in path.lower()}
    assert wanted and paths(pj.NormTuning(), model) == wanted


def test_a_position_table_is_no_bias():
    def fn(params, x):
        return (x + params['wpe']) @ params['w'] + params['b'][None]

    params = {'wpe': jnp.ones((3, 4)), 'w': jnp.ones((4, 5)), 'b': jnp.ones(5)}
    peft = pj.attach(pj.BitFit(), fn, params, jnp.ones((3, 4)))
    assert [site.path for site in peft.sites[0]] == ['b']


def test_a_norm_may_count_from_one():
    def fn(params, x):
        return (x * (1 + params['norm']['weight'])[None]) @ params['w']

    params = {'norm': {'weight': jnp.zeros(4)}, 'w': jnp.ones((4, 5))}
    peft = pj.attach(pj.NormTuning(), fn, params, jnp.ones((3, 4)))
    assert [site.path for site in peft.sites[0]] == ['norm/weight']


def test_a_target_narrows():
    assert paths(pj.BitFit(target='layers/0/.*bias'), 'plain') == {
        f'layers/0/{name}/bias' for name in BIASES
    }
    assert paths(pj.NormTuning(target='last_norm/scale'), 'scanned') == {'layers/last_norm/scale'}


def test_everything_is_every_leaf_that_is_used():
    params = {'w': jnp.ones((4, 5)), 'idle': jnp.ones(3), 'steps': jnp.arange(5)}
    fn = lambda params, x: x @ params['w'] + params['steps'][None].astype(jnp.float32)
    peft = pj.attach(pj.Trainable(target='.'), fn, params, jnp.ones((3, 4)))
    assert set(peft.init(jax.random.key(0), params)) == {'w'}


METHODS = [pj.BitFit, pj.NormTuning, pj.Trainable]


@pytest.mark.parametrize('method', METHODS)
def test_whole_numbers_cannot_be_trained(method):
    params = {'w': jnp.ones((4, 5)), 'steps': jnp.arange(5), 'scale': jnp.arange(5)}
    params |= {'bias': jnp.ones(5), 'gain': jnp.ones(5)}

    def fn(params, x):
        y = x @ params['w'] * params['gain'] + params['bias']
        return y + jnp.sin(jnp.arange(5) * params['scale'] + params['steps'])

    what = r".* trains leaves of floating dtype; target='steps' finds only 'steps' \(int32\)"
    with pytest.raises(ValueError, match=method.__name__ + what):
        pj.attach(method(target='steps'), fn, params, jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="target='steps' finds only"):
        pj.attach(method(target=('bias', 'steps')), fn, params, jnp.ones((3, 4)))
    peft = pj.attach(method(target='.'), fn, params, jnp.ones((3, 4)))
    found = {site.path for site in peft.sites[0]}
    assert 'bias' in found and not found & {'scale', 'steps'}


@pytest.mark.parametrize('method', METHODS)
def test_a_key_among_the_parameters_is_left_alone(method):
    params = {'w': jnp.ones((4, 5)), 'bias': jnp.ones(5), 'rng': jax.random.key(4)}
    params |= {'gain': jnp.ones(5)}

    def fn(params, x):
        noise = jax.random.normal(params['rng'], (5,))
        return x @ params['w'] * params['gain'] + params['bias'] + noise

    x = jnp.ones((3, 4))
    peft = pj.attach(method(target='.'), fn, params, x)
    phi = peft.init(jax.random.key(0), params)
    assert 'bias' in phi and 'rng' not in phi
    np.testing.assert_array_equal(peft.wrap(fn)(params, phi, x), fn(params, x))
    assert jax.random.key_data(peft.merge(params, phi)['rng']).shape == (2,)
    with pytest.raises(ValueError, match="finds only 'rng'"):
        pj.attach(method(target='rng'), fn, params, x)


def test_phi_replaces_the_leaf():
    case = MODELS['scanned']
    peft = pj.attach(pj.Trainable(target='head'), case.fn, case.params, case.inputs)
    fresh = peft.init(jax.random.key(0), case.params)
    phi = {path: {'value': 2 * v['value']} for path, v in fresh.items()}
    doubled = {**case.params, 'head': jax.tree.map(lambda leaf: 2 * leaf, case.params['head'])}
    forward = peft.wrap(case.fn)
    np.testing.assert_array_equal(
        forward(case.params, phi, case.inputs), case.fn(doubled, case.inputs)
    )
    grads = jax.grad(lambda phi: forward(case.params, phi, case.inputs).sum())(phi)
    full = jax.grad(lambda params: case.fn(params, case.inputs).sum())(doubled)['head']
    for name in ('kernel', 'bias'):
        np.testing.assert_allclose(grads[f'head/{name}']['value'], full[name], rtol=1e-5)


def test_phi_is_wide_over_narrow_leaves():
    params = {'w': jnp.ones((4, 5), jnp.bfloat16)}
    fn = lambda params, x: x @ params['w']
    peft = pj.attach(pj.Trainable(target='w'), fn, params, jnp.ones((3, 4), jnp.bfloat16))
    phi = peft.init(jax.random.key(0), params)
    assert phi['w']['value'].dtype == jnp.float32
    assert peft.merge(params, phi)['w'].dtype == jnp.bfloat16


def test_what_is_not_there():
    case = APPLIES['plain']
    with pytest.raises(ValueError, match="BitFit adapts sites of kind bias; target='.' finds only"):
        pj.attach(pj.BitFit(), case.fn, case.params, *case.args)
    with pytest.raises(ValueError, match='NormTuning adapts sites of kind scale, bias'):
        pj.attach(pj.NormTuning(), case.fn, case.params, *case.args)
    with pytest.raises(ValueError, match="no site matches target='heads'. Nearest: 'w'"):
        pj.attach(pj.Trainable(target='heads'), case.fn, case.params, *case.args)
