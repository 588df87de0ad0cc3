import jax
import jax.numpy as jnp
import numpy as np
import pytest
from applies import APPLIES
from blocks import MODELS
from zoo import normal

import peftjax as pj

X, W, TOKENS = normal(0, 3, 6), normal(1, 6, 4), jnp.array([[0, 3], [2, 2]])
linear = lambda params, x: x @ params['w']


def shapes(method, fn, params, *args):
    peft = pj.attach(method, fn, params, *args)
    return jax.tree.map(jnp.shape, peft.init(jax.random.key(0), params))


def fresh(method, fn, params, *args, key=0):
    """A plan and a phi of which no number is zero."""
    peft = pj.attach(method, fn, params, *args)
    keys = iter(range(100))
    phi = jax.tree.map(
        lambda leaf: leaf + normal(next(keys), *leaf.shape), peft.init(jax.random.key(key), params)
    )
    return peft, phi


@pytest.mark.parametrize(
    ('name', 'a', 'b'),
    [
        ('plain', (6, 2), (2, 4)),
        ('transposed', (6, 2), (2, 4)),
        ('einsum_first', (6, 2), (2, 4)),
        ('einsum_heads_out', (6, 2), (2, 2, 4)),
        ('einsum_heads_in', (2, 4, 2), (2, 5)),
        ('experts', (2, 6, 2), (2, 2, 4)),
        ('experts_first', (2, 6, 2), (2, 2, 4)),
        ('ragged', (3, 6, 2), (3, 2, 4)),
        ('index_static', (3, 6, 2), (3, 2, 6)),
        ('scan_xs', (3, 6, 2), (3, 2, 6)),
        ('scan_nested', (2, 3, 6, 2), (2, 3, 2, 6)),
        ('conv_nhwc', (3, 2, 3, 2), (2, 4)),
        ('conv_nchw', (3, 3, 2, 2), (2, 4)),
        ('conv_grouped', (3, 2, 2, 2), (2, 6)),
        ('gather', (7, 2), (2, 4)),
    ],
)
def test_phi_follows_the_meaning_of_the_axes(name, a, b):
    case = APPLIES[name]
    method = pj.Lora(rank=2, target='.')
    peft = pj.attach(method, case.fn, case.params, *case.args, **case.kwargs)
    assert jax.tree.map(jnp.shape, peft.init(jax.random.key(0), case.params)) == {
        'w': {'a': a, 'b': b}
    }


@pytest.mark.parametrize(
    ('fields', 'scale'),
    [
        ({}, 1),
        ({'alpha': 6.0}, 3),
        ({'alpha': 6.0, 'rank_stabilized': True}, 6 / 2**0.5),
        ({'alpha': 6.0, 'alphas': (('w', 1.0),)}, 0.5),
        ({'alpha': 6.0, 'alphas': (('x', 1.0), ('w', 4.0)), 'ranks': (('w', 4), ('.', 1))}, 1),
    ],
)
def test_the_product_is_added(fields, scale):
    if any(pattern == 'x' for pattern, _ in fields.get('alphas', ())):
        params = {'w': W, 'x': jnp.eye(4)}
        fn = lambda params, x: x @ params['w'] @ params['x']
    else:
        params, fn = {'w': W}, linear
    peft, phi = fresh(pj.Lora(rank=2, target='.', **fields), fn, params, X)
    phi = {
        path: pair if path == 'w' else jax.tree.map(jnp.zeros_like, pair)
        for path, pair in phi.items()
    }
    wanted = X @ (W + scale * phi['w']['a'] @ phi['w']['b'])
    np.testing.assert_allclose(peft.wrap(fn)(params, phi, X), wanted, rtol=1e-4, atol=1e-5)


def test_a_lookup_starts_with_zeros_on_its_rows():
    fn = lambda params, ids: params['w'][ids]
    peft = pj.attach(pj.Lora(rank=2, target='w'), fn, {'w': W}, TOKENS)
    phi = peft.init(jax.random.key(0), {'w': W})['w']
    assert not phi['a'].any() and phi['b'].all()
    phi = {'w': {**phi, 'a': normal(3, 6, 2)}}
    wanted = (W + phi['w']['a'] @ phi['w']['b'])[TOKENS]
    np.testing.assert_allclose(peft.wrap(fn)({'w': W}, phi, TOKENS), wanted, atol=1e-5)


def test_the_first_factor_is_uniform_by_the_inputs():
    params = {'w': jnp.ones((100, 4))}
    peft = pj.attach(pj.Lora(rank=4, target='w'), linear, params, jnp.ones((1, 100)))
    a = peft.init(jax.random.key(0), params)['w']['a']
    assert 0.09 < jnp.abs(a).max() <= 0.1 and abs(float(a.std()) - 0.1 / 3**0.5) < 0.005


def dropped(fn, params, *args, target='w', **fields):
    """Outputs with dropout, of a model that is linear in its low-rank path."""
    peft, phi = fresh(pj.Lora(rank=2, target=target, dropout=0.4, **fields), fn, params, *args)
    forward = peft.wrap(fn)
    return lambda seed: forward(
        params, phi, *args, dropout_key=None if seed is None else jax.random.key(seed)
    )


def test_dropout_is_off_without_a_key_and_right_on_average():
    call = dropped(linear, {'w': W}, X)
    without = call(None)
    peft, phi = fresh(pj.Lora(rank=2, target='w'), linear, {'w': W}, X)
    np.testing.assert_array_equal(without, peft.wrap(linear)({'w': W}, phi, X))
    np.testing.assert_array_equal(call(3), call(3))
    assert not jnp.allclose(call(3), call(4))
    peft, phi = fresh(pj.Lora(rank=2, target='w', dropout=0.4), linear, {'w': W}, X)
    keys = jax.random.split(jax.random.key(0), 4000)
    outs = jax.vmap(lambda key: peft.wrap(linear)({'w': W}, phi, X, dropout_key=key))(keys)
    error = outs.std(0) / 4000**0.5
    assert (jnp.abs(outs.mean(0) - without) < 5 * error).all()


def test_dropout_differs_between_scanned_layers():
    eye = jnp.broadcast_to(jnp.eye(20), (3, 20, 20))

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (x, x @ w), x, params['w'])[1]

    peft = pj.attach(pj.Lora(rank=20, target='w', dropout=0.5), fn, {'w': eye}, jnp.ones((1, 20)))
    # the low-rank path shows the mask itself
    phi = {'w': {'a': eye, 'b': eye}}
    key = jax.random.key(0)
    out = peft.wrap(fn)({'w': eye}, phi, jnp.ones((1, 20)), dropout_key=key) - 1
    assert set(np.unique(out)) == {0, 2}
    assert len(np.unique(np.asarray(out), axis=0)) == 3


def test_two_methods_of_a_chain_drop_apart():
    both = pj.chain(*[pj.Lora(rank=6, target='w', dropout=0.5)] * 2)
    fn, params, x = linear, {'w': jnp.zeros((6, 6))}, jnp.ones((8, 6))
    peft = pj.attach(both, fn, params, x)
    phi = {name: {'w': {'a': jnp.eye(6), 'b': jnp.eye(6)}} for name in ('lora', 'lora_2')}
    out = peft.wrap(fn)(params, phi, x, dropout_key=jax.random.key(0))
    assert set(np.unique(out)) == {0, 2, 4}


def test_a_lookup_knows_no_dropout():
    call = dropped(lambda params, ids: params['w'][ids], {'w': W}, TOKENS)
    np.testing.assert_array_equal(call(None), call(1))


def test_phi_of_a_dtype():
    peft = pj.attach(pj.Lora(rank=2, target='w', dtype='bfloat16'), linear, {'w': W}, X)
    phi = peft.init(jax.random.key(0), {'w': W})
    assert {leaf.dtype.name for leaf in jax.tree.leaves(phi)} == {'bfloat16'}


@pytest.mark.parametrize('dtype', [jnp.bfloat16, np.float16, np.dtype('float32')])
def test_fields_come_into_one_form(dtype):
    given: dict = {'dtype': dtype, 'ranks': {'w': 2}, 'alphas': [['w', np.float64(3.0)]]}
    method = pj.Lora(target='w', alpha=np.float32(0.5), **given)
    assert method == pj.Lora(
        target='w', dtype=np.dtype(dtype).name, ranks=(('w', 2),), alphas=(('w', 3.0),), alpha=0.5
    )
    assert type(method.alpha) is float and type(method.alphas[0][1]) is float
    hash(method)


def test_what_is_trained_with_is_stored(tmp_path):
    methods = (
        pj.Lora(target='w', dtype=np.float32, ranks={'w': 2}),  # pyright: ignore
        pj.Adapter(target='w', reductions={'w': 2}, scale=np.float32(2)),  # pyright: ignore
    )
    for i, method in enumerate(methods):
        peft, phi = fresh(method, linear, {'w': W}, X)
        assert pj.load(pj.save(tmp_path / f'{i}', peft, phi, params={'w': W})).peft == peft


@pytest.mark.parametrize(
    ('fields', 'match'),
    [
        ({'rank': 0}, 'rank must be a positive integer; got 0'),
        ({'rank': True}, 'rank must be a positive integer; got True'),
        ({'rank': 2.0}, 'rank must be a positive integer; got 2.0'),
        ({'ranks': (('w', -1),)}, r"ranks\['w'\] must be a positive integer; got -1"),
        ({'alpha': 0}, 'alpha must be positive; got 0'),
        ({'alphas': (('w', -2.0),)}, r"alphas\['w'\] must be positive; got -2.0"),
        ({'alpha': float('inf')}, 'alpha must be a finite number; got inf'),
        ({'alpha': '8'}, "alpha must be a finite number; got '8'"),
        ({'alpha': True}, 'alpha must be a finite number; got True'),
        ({'dropout': '0.1'}, "dropout must be a finite number; got '0.1'"),
        ({'dtype': 'int8'}, "dtype must be a floating one, such as .*; got 'int8'"),
        ({'dtype': 'foo'}, "dtype must be a floating one, such as .*; got 'foo'"),
        ({'dtype': None}, 'dtype must be a floating one, such as .*; got None'),
        ({'ranks': ('query', 4)}, r"ranks must be pairs, such as .*; got \('query', 4\)"),
        ({'ranks': 'qv'}, "ranks must be pairs, such as .*; got 'qv'"),
        ({'ranks': {'w': '4'}}, r"ranks\['w'\] must be a positive integer; got '4'"),
        ({'dropout': 1.0}, r'dropout must be in \[0, 1\); got 1.0'),
        ({'dropout': -0.1}, r'dropout must be in \[0, 1\); got -0.1'),
    ],
)
def test_fields_out_of_range(fields, match):
    with pytest.raises(ValueError, match=match):
        pj.Lora(target='w', **fields)


@pytest.mark.parametrize(
    ('fields', 'match'),
    [
        (
            {'target': 'w', 'rank': 5},
            r"Lora\(rank=5\) on 'w' of shape \(6, 4\): rank must be at most 4",
        ),
        ({'target': 'kernel'}, "no site matches target='kernel'.* Nearest: 'w'"),
        ({'target': ('w', 'v')}, "no site matches target='v'"),
        (
            {'target': 'w', 'rank': 2, 'ranks': (('q', 1),)},
            "ranks: 'q' matches none of the 1 sites",
        ),
        ({'target': 'w', 'rank': 2, 'alphas': (('q', 1.0),)}, "alphas: 'q' matches none"),
    ],
)
def test_what_does_not_fit_the_model(fields, match):
    with pytest.raises(ValueError, match=match):
        pj.attach(pj.Lora(**fields), linear, {'w': W}, X)


def test_a_bias_is_no_matrix():
    case = APPLIES['with_bias']
    with pytest.raises(ValueError, match=r"Lora adapts .* finds only 'up/bias' \(bias\)"):
        pj.attach(pj.Lora(rank=2, target='bias'), case.fn, case.params, *case.args)


def test_gradients_are_those_of_the_product():
    model = MODELS['scanned']
    peft, phi = fresh(
        pj.Lora(rank=2, target='(up|key)/kernel'), model.fn, model.params, model.inputs
    )
    through = lambda fn: jax.grad(lambda phi: (fn(phi) ** 2).sum())(phi)
    direct = through(lambda phi: peft.wrap(model.fn)(model.params, phi, model.inputs))
    merged = through(lambda phi: model.fn(peft.merge(model.params, phi), model.inputs))
    for a, b in zip(jax.tree.leaves(direct), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * float(jnp.abs(b).max()))
