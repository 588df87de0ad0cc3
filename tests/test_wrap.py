import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import MODELS
from jax.ad_checkpoint import checkpoint_name
from prompted import IDS
from prompted import PARAMS as PROMPTED
from prompted import model as prompted
from zoo import normal

import peftjax as pj

X, PARAMS, KEY = normal(0, 3, 6), {'kernel': normal(1, 6, 4)}, jax.random.key(0)


def linear(params, x):
    return x @ params['kernel']


def away(phi):
    return jax.tree.map(lambda leaf: leaf + 0.3, phi)


def same_as_attached(wrapped, method, fn, params, *args, **kwargs):
    peft = pj.attach(method, fn, params, *args, **kwargs)
    forward, phi = wrapped
    assert forward.peft == peft
    for a, b in zip(jax.tree.leaves(phi), jax.tree.leaves(peft.init(KEY, params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_allclose(
        forward(params, away(phi), *args, **kwargs),
        peft.wrap(fn)(params, away(phi), *args, **kwargs),
        atol=1e-5,
    )


def test_the_front_doors_are_attach_and_init():
    method = pj.Lora(rank=2, target='kernel')
    wrapped = pj.lora_wrap(linear, PARAMS, X, key=KEY, rank=2, target='kernel')
    same_as_attached(wrapped, method, linear, PARAMS, X)
    method = pj.Adapter(reduction=2, target='kernel')
    wrapped = pj.adapter_wrap(linear, PARAMS, X, key=KEY, reduction=2, target='kernel')
    same_as_attached(wrapped, method, linear, PARAMS, X)
    wrapped = pj.prompt_prepend(prompted, PROMPTED, IDS, key=KEY, length=2)
    same_as_attached(wrapped, pj.PromptTuning(length=2), prompted, PROMPTED, IDS)
    wrapped = pj.prefix_wrap(prompted, PROMPTED, IDS, key=KEY, length=2)
    same_as_attached(wrapped, pj.PrefixTuning(length=2), prompted, PROMPTED, IDS)
    method = pj.chain(pj.Lora(rank=2, target='kernel'), pj.Ia3(target='kernel'))
    wrapped = pj.method_wrap(method, linear, PARAMS, X, key=KEY)
    same_as_attached(wrapped, method, linear, PARAMS, X)


def test_a_call_of_one_shape_is_traced_once():
    traces = []

    def counted(params, x, *, train=False):
        traces.append(train)
        return linear(params, x)

    forward, phi = pj.lora_wrap(counted, PARAMS, X, key=KEY, rank=2, target='kernel')
    forward(PARAMS, phi, X)
    once = len(traces)
    forward(PARAMS, away(phi), X + 1)
    forward(PARAMS, phi, np.asarray(X))
    assert len(traces) == once
    forward(PARAMS, phi, X, train=True)
    assert len(traces) > once and traces[-1] is True


def test_what_is_not_an_array_is_static():
    def fn(params, batch, act, *, train, scale=1.0):
        assert isinstance(train, bool) and isinstance(scale, float) and batch['name'] == 'a'
        return act(scale * linear(params, batch['x'])) + (1.0 if train else 0.0)

    batch = {'x': X, 'name': 'a', 'none': None}
    forward, phi = pj.lora_wrap(
        fn, PARAMS, batch, jnp.tanh, key=KEY, kwargs={'train': False}, rank=2, target='kernel'
    )
    out = forward(PARAMS, phi, batch, jnp.tanh, train=True, scale=2.0)
    np.testing.assert_allclose(out, jnp.tanh(2 * linear(PARAMS, X)) + 1, atol=1e-6)
    out = forward(PARAMS, phi, batch, jnp.sin, train=False)
    np.testing.assert_allclose(out, jnp.sin(linear(PARAMS, X)), atol=1e-6)


def test_keywords_of_any_name_reach_the_function():
    def model(params, x, *, method, apply_fn):
        return linear(params, x) * (2 if (method, apply_fn) == ('hidden', 'mine') else 1)

    how = {'method': 'hidden', 'apply_fn': 'mine'}
    peft = pj.attach(pj.Lora(rank=2, target='kernel'), model, PARAMS, X, **how)
    assert [site.kind for site in pj.sites(model, PARAMS, X, **how)] == ['linear']
    forward = peft.wrap(model)
    np.testing.assert_allclose(
        forward(PARAMS, peft.init(KEY, PARAMS), X, **how), 2 * linear(PARAMS, X), rtol=1e-6
    )


def test_the_key_of_dropout_is_not_taken_from_a_function_that_has_its_own():
    def model(params, x, dropout_key=None):
        return linear(params, x) if dropout_key is None else 0 * linear(params, x)

    method = pj.Lora(rank=2, target='kernel')
    with pytest.raises(TypeError, match='dropout_key is a keyword of the forward.* Leave it out'):
        pj.attach(method, model, PARAMS, X, dropout_key=KEY)
    peft = pj.attach(method, model, PARAMS, X)
    with pytest.raises(TypeError, match=r'model has one of its own\. Rename that, or close over'):
        peft.wrap(model)
    phi = peft.init(KEY, PARAMS)
    for closed in (
        lambda params, x: model(params, x, dropout_key=KEY),
        functools.partial(model, dropout_key=KEY),
    ):
        assert not peft.wrap(closed)(PARAMS, phi, X).any()
    # what is passed on by any name is another's
    passed = lambda params, x, **rest: linear(params, x) * (3 if rest else 1)
    out = peft.wrap(passed)(PARAMS, phi, X, dropout_key=KEY)
    np.testing.assert_array_equal(out, linear(PARAMS, X))


@pytest.mark.parametrize(
    ('method', 'got'), [('lora', "got 'lora'. Make one"), (pj.Lora, 'got the class Lora. Make')]
)
def test_what_is_attached_is_a_method(method, got):
    with pytest.raises(TypeError, match=rf'a method with its fields.* {got}'):
        pj.attach(method, linear, PARAMS, X)


def test_static_arguments_that_are_equal_and_of_other_types_are_others():
    fn = lambda params, x, n: linear(params, x) * (1 if n is True else 2 if n == 1 else 3)
    forward, phi = pj.lora_wrap(fn, PARAMS, X, 1, key=KEY, rank=2, target='kernel')
    for n in (1, True, 1.0, 0, False):
        np.testing.assert_array_equal(forward(PARAMS, phi, X, n), fn(PARAMS, X, n))


def test_static_numbers_are_told_apart_by_their_bits():
    traced = []

    def fn(params, x, n):
        traced.append(n)
        return linear(params, x) * math.copysign(1, n)

    forward, phi = pj.lora_wrap(fn, PARAMS, X, 1.0, key=KEY, rank=2, target='kernel')
    for n in (0.0, -0.0, math.inf):
        np.testing.assert_array_equal(forward(PARAMS, phi, X, n), fn(PARAMS, X, n))
    forward(PARAMS, phi, X, float('nan'))
    before = len(traced)
    forward(PARAMS, phi, X, float('nan'))
    assert len(traced) == before


def test_a_static_argument_must_be_hashable():
    fn = lambda params, x, names: linear(params, x)
    forward, phi = pj.lora_wrap(fn, PARAMS, X, 'a', key=KEY, rank=2, target='kernel')
    with pytest.raises(TypeError, match=r"must be hashable; got \{'a'\}. Close over it"):
        forward(PARAMS, phi, X, {'a'})


def test_dropout_takes_a_key():
    forward, phi = pj.lora_wrap(linear, PARAMS, X, key=KEY, rank=2, target='kernel', dropout=0.5)
    phi = away(phi)
    outs = [forward(PARAMS, phi, X, dropout_key=jax.random.key(i)) for i in (0, 0, 1)]
    np.testing.assert_array_equal(outs[0], outs[1])
    assert not jnp.allclose(outs[0], outs[2])
    assert not jnp.allclose(outs[0], forward(PARAMS, phi, X))


@pytest.mark.parametrize(
    ('key', 'got'),
    [
        (jax.random.PRNGKey(0), r'got uint32 of shape \(2,\)'),
        (jax.random.split(KEY), r'got key<fry> of shape \(2,\)'),
        (0, 'got 0'),
    ],
)
def test_a_key_is_one_typed_key(key, got):
    forward, phi = pj.lora_wrap(linear, PARAMS, X, key=KEY, rank=2, target='kernel', dropout=0.5)
    with pytest.raises(TypeError, match=rf'typed PRNG key, jax.random.key\(seed\); {got}'):
        forward.peft.init(key, PARAMS)
    with pytest.raises(TypeError, match=rf'typed PRNG key, jax.random.key\(seed\); {got}'):
        forward(PARAMS, phi, X, dropout_key=key)


def test_a_forward_lives_inside_other_transformations():
    case = MODELS['flax_nnx']
    forward, phi = pj.lora_wrap(
        case.fn, case.params, case.inputs, key=KEY, rank=2, target='query/kernel'
    )
    loss = lambda phi: (forward(case.params, phi, case.inputs) ** 2).mean()
    grads = jax.jit(jax.grad(loss))(away(phi))
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    stack = jax.tree.map(lambda a, b: jnp.stack([a, b]), phi, away(phi))
    losses = jax.vmap(loss)(stack)
    np.testing.assert_allclose(losses, [loss(phi), loss(away(phi))], rtol=1e-5)


def named(layers):
    """A model that names the output of each layer."""

    def fn(params, x):
        for _ in range(layers):
            x = checkpoint_name(jnp.tanh(x @ params['kernel']), 'h')
        return x

    return fn


@pytest.mark.parametrize('layers', [1, 3])
def test_a_function_may_call_the_model_several_times(layers):
    params, fn, other = {'kernel': normal(2, 6, 6)}, named(layers), normal(3, 2, 6)
    peft = pj.attach(pj.Adapter(target='@h', reduction=2), fn, params, X)
    phi, forward = away(peft.init(KEY, params)), peft.wrap(fn)
    both = peft.wrap(lambda params, x, other: (fn(params, x), fn(params, other)))
    for out, x in zip(both(params, phi, X, other), (X, other), strict=True):
        np.testing.assert_allclose(out, forward(params, phi, x), atol=1e-6)
        assert jnp.abs(out - fn(params, x)).max() > 0.1


def test_names_that_cannot_be_told_apart_are_refused():
    fn = named(2)
    params = {'kernel': normal(2, 6, 6)}
    peft = pj.attach(pj.Adapter(target='@h', reduction=2), fn, params, X)
    phi = peft.init(KEY, params)
    with pytest.raises(ValueError, match="must name 'h' as often .* 2 times, .* 3 times"):
        peft.wrap(lambda params, x: checkpoint_name(fn(params, x), 'h'))(params, phi, X)
    unnamed = lambda params, x: x @ params['kernel']  # a part of the model
    np.testing.assert_array_equal(peft.wrap(unnamed)(params, phi, X), unnamed(params, X))


def test_a_derivative_is_taken_of_the_wrapped_function():
    """Inside the function it would be that of the layer without the method."""
    energy = lambda params, x: jnp.tanh(x @ params['kernel']).sum()
    force = lambda params, x: jax.grad(energy, 1)(params, x)
    ia3 = pj.attach(pj.Ia3(target='kernel'), energy, PARAMS, X)
    phi = away(ia3.init(KEY, PARAMS))
    with pytest.raises(ValueError, match=r"'kernel' is adapted, .* jax.grad\(peft.wrap\(fn\)"):
        ia3.wrap(force)(PARAMS, phi, X)
    outside = jax.grad(ia3.wrap(energy), 2)(PARAMS, phi, X)
    np.testing.assert_allclose(outside, force(ia3.merge(PARAMS, phi), X), atol=1e-6)
    lora = pj.attach(pj.Lora(rank=2, target='kernel'), energy, PARAMS, X)
    phi = away(lora.init(KEY, PARAMS))
    inside = lora.wrap(force)(PARAMS, phi, X)
    np.testing.assert_allclose(inside, force(lora.merge(PARAMS, phi), X), atol=1e-6)


def test_the_plan_is_at_hand():
    forward, phi = pj.lora_wrap(linear, PARAMS, X, key=KEY, rank=2, target='kernel')
    merged = forward.peft.merge(PARAMS, away(phi))
    np.testing.assert_allclose(linear(merged, X), forward(PARAMS, away(phi), X), atol=1e-5)


def test_there_is_no_default_seed():
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'key'"):
        pj.lora_wrap(linear, PARAMS, X, rank=2, target='kernel')


def test_errors_come_before_the_first_call():
    with pytest.raises(ValueError, match="no site matches target='q_proj'. Nearest: 'kernel'"):
        pj.lora_wrap(linear, PARAMS, X, key=KEY, target='q_proj')
