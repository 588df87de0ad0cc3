import jax
import jax.numpy as jnp
import numpy as np
import pytest
from applies import APPLIES
from blocks import MODELS
from zoo import normal

import peftjax as pj

X, W = normal(0, 3, 6), normal(1, 6, 4)
PHI = {'w': {'a': normal(2, 6, 2), 'b': normal(3, 2, 4), 'm': 1 + normal(4, 4) ** 2}}
linear = lambda params, x: x @ params['w']


def formula(w, phi, x, scale):
    """Equation 5 of the paper, and its gradient's rule: the norm is a constant."""
    v = w + scale * phi['a'] @ phi['b']
    norm = jax.lax.stop_gradient(jnp.linalg.norm(v, axis=0))
    return x @ (v * (phi['m'] / norm)[None])


@pytest.mark.parametrize(
    'name', ['plain', 'transposed', 'conv_nchw', 'experts', 'gather', 'scan_xs']
)
def test_magnitudes_have_the_shape_of_outputs(name):
    case = APPLIES[name]
    outputs = {'plain': (4,), 'transposed': (4,), 'conv_nchw': (4,), 'experts': (2, 4)}
    peft = pj.attach(pj.Dora(rank=2, target='w'), case.fn, case.params, *case.args)
    phi = peft.init(jax.random.key(0), case.params)
    assert phi['w']['m'].shape == {**outputs, 'gather': (4,), 'scan_xs': (3, 6)}[name]


def test_magnitudes_start_as_norms():
    model = MODELS['linen']
    peft = pj.attach(pj.Dora(rank=2, target='query/kernel'), model.fn, model.params, model.inputs)
    w = model.params['layers']['query']['kernel']  # (in, layers, heads, head width)
    phi = peft.init(jax.random.key(0), model.params)
    np.testing.assert_allclose(
        phi['layers/query/kernel']['m'], np.linalg.norm(w, axis=0), rtol=1e-6
    )


@pytest.mark.parametrize('alpha', [None, 5.0])
def test_output_and_gradient_follow_the_paper(alpha):
    scale = 1 if alpha is None else alpha / 2
    peft = pj.attach(pj.Dora(rank=2, alpha=alpha, target='w'), linear, {'w': W}, X)
    forward = lambda phi: peft.wrap(linear)({'w': W}, phi, X)
    np.testing.assert_allclose(forward(PHI), formula(W, PHI['w'], X, scale), atol=1e-5)
    weigh = lambda y: (y * normal(5, 3, 4)).sum()
    direct = jax.grad(lambda phi: weigh(forward(phi)))(PHI)['w']
    paper = jax.grad(lambda phi: weigh(formula(W, phi, X, scale)))(PHI['w'])
    for name in PHI['w']:
        np.testing.assert_allclose(direct[name], paper[name], rtol=1e-4, atol=1e-5)


def test_the_norm_is_taken_of_what_stands_below():
    both = pj.chain(pj.Lora(rank=2, target='w'), pj.Dora(rank=2, target='w'))
    peft = pj.attach(both, linear, {'w': W}, X)
    low = {'a': normal(7, 6, 2), 'b': normal(8, 2, 4)}
    out = peft.wrap(linear)({'w': W}, {'lora': {'w': low}, 'dora': PHI}, X)
    np.testing.assert_allclose(
        out, formula(W + low['a'] @ low['b'], PHI['w'], X, 1), rtol=1e-4, atol=1e-5
    )


def test_a_tied_table_is_decomposed_for_both_uses():
    case = APPLIES['tied']
    peft = pj.attach(pj.Dora(rank=2, target='w'), case.fn, case.params, *case.args)
    phi = {'w': {'a': normal(2, 7, 2), 'b': normal(3, 2, 6), 'm': 1 + normal(4, 6) ** 2}}
    out = peft.wrap(case.fn)(case.params, phi, *case.args)
    np.testing.assert_allclose(
        out, case.fn(peft.merge(case.params, phi), *case.args), rtol=1e-4, atol=1e-4
    )


def test_a_tied_table_may_be_a_head_first():
    params, x = {'w': normal(1, 9, 4)}, normal(2, 5, 4)
    fn = lambda p, x: p['w'][(x @ p['w'].T).argmax(-1)]
    peft = pj.attach(pj.Dora(rank=2, target='w'), fn, params, x)
    phi = {'w': {'a': normal(3, 4, 2), 'b': normal(4, 2, 9), 'm': normal(5, 9)}}
    wanted = fn(peft.merge(params, phi), x)
    np.testing.assert_allclose(peft.wrap(fn)(params, phi, x), wanted, rtol=1e-4, atol=1e-5)


def test_an_output_without_weights_stays_finite():
    w = W.at[:, 1].set(0)
    peft = pj.attach(pj.Dora(rank=2, target='w'), linear, {'w': w}, X)
    phi = peft.init(jax.random.key(0), {'w': w})
    forward = lambda phi: peft.wrap(linear)({'w': w}, phi, X)
    np.testing.assert_allclose(forward(phi), X @ w, atol=1e-5)
    grads = jax.grad(lambda phi: (forward(phi) ** 2).sum())(phi)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_dropout_needs_a_key():
    peft = pj.attach(pj.Dora(rank=2, dropout=0.5, target='w'), linear, {'w': W}, X)
    forward = peft.wrap(linear)
    out = forward({'w': W}, PHI, X)
    np.testing.assert_allclose(out, formula(W, PHI['w'], X, 1), atol=1e-5)
    assert not jnp.allclose(out, forward({'w': W}, PHI, X, dropout_key=jax.random.key(0)))


def test_the_adapted_weight_is_not_formed():
    params = {'w': jax.ShapeDtypeStruct((64, 48), jnp.float32)}
    x = jax.ShapeDtypeStruct((1, 64), jnp.float32)
    peft = pj.attach(pj.Dora(rank=2, target='w'), linear, params, x)
    phi = jax.eval_shape(peft.init, jax.random.key(0), params)
    jaxpr = jax.make_jaxpr(peft.wrap(linear))(params, phi, x)
    large = [e.primitive.name for e in jaxpr.eqns if e.outvars[0].aval.shape == (64, 48)]
    assert large == ['stop_gradient']


@pytest.mark.parametrize('dtype', ['int8', 'complex64'])
def test_norms_are_those_of_real_weights(dtype):
    method, fn = pj.Dora(rank=2, target='w'), lambda p, x: x @ p['w'].astype(x.dtype)
    params, x = {'w': jnp.ones((6, 4), dtype)}, X.astype('complex64')
    with pytest.raises(ValueError, match=f"norms of real floating weights; 'w' is {dtype}. Conv"):
        pj.attach(method, fn, params, x)
    # Lora needs no norm
    assert pj.attach(pj.Lora(rank=2, target='w'), fn, params, x).count() == 20


def test_errors_name_the_method():
    with pytest.raises(ValueError, match='Dora: rank must be a positive integer; got 0'):
        pj.Dora(rank=0, target='w')
    with pytest.raises(ValueError, match=r"Dora\(rank=9\) on 'w' .* rank must be at most 4"):
        pj.attach(pj.Dora(rank=9, target='w'), linear, {'w': W}, X)
    with pytest.raises(ValueError, match="ranks: 'q' matches none"):
        pj.attach(pj.Dora(rank=2, ranks=(('q', 1),), target='w'), linear, {'w': W}, X)
