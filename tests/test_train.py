"""The step: parts of a batch, updates that are not finite, and what is left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import compiled
from zoo import normal

import peftjax as pj
from peftjax.losses import Loss

PARAMS = {'kernel': normal(0, 6, 4)}
X, WEIGHTS = normal(1, 12, 6), jnp.arange(12.0) % 5
METHOD = pj.Lora(rank=2, target='kernel')


def model(params, x):
    return jnp.tanh(x @ params['kernel'])


def setup(tx, method=METHOD, dtype=None):
    params = PARAMS if dtype is None else jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    peft = pj.attach(method, model, params, X.astype(params['kernel'].dtype))
    phi = jax.tree.map(lambda x: x + 0.1, peft.init(jax.random.key(0), params))
    return params, peft.wrap(model), pj.start(tx, phi, jax.random.key(1))


def weighted(forward):
    def loss(params, phi, batch, key):
        del key
        x, weights = batch
        return Loss((((forward(params, phi, x) - 1) ** 2).sum(-1) * weights).sum(), weights.sum())

    return loss


def close(a, b, tolerance=1e-6):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b
    )


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def cut(batch, parts):
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)


@pytest.mark.parametrize('parts', [2, 3, 12])
def test_accumulated_parts_are_the_large_batch(parts):
    """Also where the parts count differently, and one of them nothing."""
    tx = optax.sgd(0.1, momentum=0.9)
    weights = WEIGHTS.at[:2].set(0)
    params, forward, state = setup(tx)
    whole, pieces = state, jax.tree.map(jnp.copy, state)
    once = pj.train_step(weighted(forward), tx)
    accumulated = pj.train_step(weighted(forward), tx, accumulate=parts)
    for _ in range(3):
        whole, loss = once(params, whole, (X, weights))
        pieces, same = accumulated(params, pieces, cut((X, weights), parts))
        close(loss, same)
    close(whole.phi, pieces.phi)
    assert int(pieces.step) == 3 and int(pieces.skipped) == 0


def test_scalars_count_alike():
    tx = optax.sgd(0.1)
    params, forward, state = setup(tx)
    loss = lambda params, phi, x, key: (forward(params, phi, x) ** 2).mean()
    other = jax.tree.map(jnp.copy, state)
    whole, a = pj.train_step(loss, tx)(params, state, X)
    pieces, b = pj.train_step(loss, tx, accumulate=4)(params, other, X.reshape(4, 3, 6))
    close((a, whole.phi), (b, pieces.phi))


def test_parts_are_summed_in_float32():
    """A sum of sixteen bfloat16 gradients would be off by more than one of them is."""
    tx = optax.sgd(1.0)
    params, forward, state = setup(tx, dtype=jnp.bfloat16)
    state = state._replace(phi=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.phi))
    x = jnp.tile(X[:1].astype(jnp.bfloat16), (16, 1, 1))
    loss = lambda params, phi, x, key: (forward(params, phi, x).astype(jnp.float32) ** 2).sum()
    one = jax.grad(lambda phi: loss(params, phi, x[0], None))(state.phi)
    step = lambda x, g: x.astype(jnp.float32) - g.astype(jnp.float32)
    expected = bits(jax.tree.map(lambda x, g: step(x, g).astype(x.dtype), state.phi, one))
    after, _ = pj.train_step(loss, tx, accumulate=16)(params, state, x)
    assert bits(after.phi) == expected


def test_each_part_draws_for_itself():
    tx = optax.sgd(0.0)
    params, _, state = setup(tx)

    def loss(params, phi, x, key):
        return Loss(jax.random.uniform(key) + 0 * phi['kernel']['a'].sum(), jnp.ones(()))

    draws = []
    for parts in (2, 3):
        copy = jax.tree.map(jnp.copy, state)
        _, mean = pj.train_step(loss, tx, accumulate=parts)(params, copy, jnp.zeros((parts, 1)))
        draws.append(parts * float(mean))
    first, second, third = (
        float(jax.random.uniform(jax.random.fold_in(jax.random.fold_in(state.key, 0), i)))
        for i in range(3)
    )
    close(np.array(draws), np.array([first + second, first + second + third]))
    assert len({first, second, third}) == 3


def test_activations_of_one_part_alone_are_held():
    tx = optax.sgd(0.1)
    params, forward, state = setup(tx)
    x = jnp.ones((64, 64, 6))
    loss = lambda params, phi, x, key: (forward(params, phi, x) ** 2).mean()

    def temporaries(accumulate, x):
        step = pj.train_step(loss, tx, accumulate=accumulate)
        memory = step.lower(params, state, x).compile().memory_analysis()  # pyright: ignore
        return memory.temp_size_in_bytes

    assert temporaries(64, x) < 0.1 * temporaries(1, x.reshape(-1, 6))


BAD = {
    'a loss': lambda total, x: total + x.sum() * 0 + jnp.where(x.max() > 1e6, jnp.nan, 0),
    'a gradient': lambda total, x: total + 0 * jnp.sqrt(jnp.where(x.max() > 1e6, total - total, 1)),
    'a square': lambda total, x: total * jnp.where(x.max() > 1e6, 1e25, 1),
}


@pytest.mark.parametrize('accumulate', [1, 3])
@pytest.mark.parametrize('bad', BAD)
def test_an_update_that_is_not_finite_is_not_made(bad, accumulate):
    tx = optax.sgd(0.1, momentum=0.9)
    params, forward, state = setup(tx)
    loss = lambda params, phi, x, key: BAD[bad]((forward(params, phi, jnp.tanh(x)) ** 2).mean(), x)
    step = pj.train_step(loss, tx, accumulate=accumulate)
    batch = X if accumulate == 1 else X.reshape(3, 4, 6)
    state, _ = step(params, state, batch)
    before = bits((state.phi, state.opt_state))
    poisoned = batch.at[(0,) * batch.ndim].set(1e7)
    state, _ = step(params, state, poisoned)
    assert bits((state.phi, state.opt_state)) == before
    assert (int(state.step), int(state.skipped)) == (2, 1)
    state, value = step(params, state, batch)
    assert bits((state.phi, state.opt_state)) != before and np.isfinite(value)
    assert (int(state.step), int(state.skipped)) == (3, 1)


def test_a_key_stays_its_owners():
    tx, key = optax.sgd(0.1), jax.random.key(1)
    params, forward, state = setup(tx)
    step = pj.train_step(weighted(forward), tx)
    for _ in range(2):
        mine = pj.start(tx, jax.tree.map(jnp.copy, state.phi), key)
        mine, _ = step(params, mine, (X, WEIGHTS))
        assert not key.is_deleted() and bits(jax.random.key_data(mine.key)) == bits(
            jax.random.key_data(key)
        )


def test_wrong_calls_say_what_came():
    tx = optax.sgd(0.1)
    params, forward, state = setup(tx)
    with pytest.raises(ValueError, match='accumulate must be at least 1: received 0'):
        pj.train_step(weighted(forward), tx, accumulate=0)
    step = pj.train_step(weighted(forward), tx, accumulate=3)
    batch = {'x': X.reshape(3, 4, 6), 'weights': WEIGHTS}
    with pytest.raises(ValueError, match=r"received \(12,\) at batch\['weights'\]"):
        step(params, state, batch)


@pytest.mark.parametrize(
    ('loss', 'said'),
    [
        (lambda *_: (jnp.zeros(()), {}), 'must be a scalar, or a pj.Loss: received tuple'),
        (lambda *_: 0.0, 'received float'),
        (lambda params, phi, batch, key: phi['kernel']['a'][0], r'Array|Tracer.* of shape \(2,\)'),
    ],
)
def test_a_loss_that_is_none_is_refused(loss, said):
    tx = optax.sgd(0.1)
    params, _, state = setup(tx)
    with pytest.raises(TypeError, match=said):
        pj.train_step(loss, tx)(params, state, X)


def test_there_must_be_a_phi():
    tx = optax.sgd(0.1)
    with pytest.raises(ValueError, match='a step trains phi; there is nothing in it'):
        pj.train_step(lambda *_: jnp.zeros(()), tx)({}, pj.start(tx, {}, jax.random.key(0)), X)


@pytest.mark.parametrize(
    'make',
    [optax.contrib.prodigy, optax.contrib.dog, lambda: optax.contrib.mechanize(optax.sgd(0.1))],
    ids=['prodigy', 'dog', 'mechanize'],
)
def test_optimizers_that_keep_phi_itself(make):
    """Its arrays stand in the state twice, and are donated once."""
    tx = make()
    with jax.numpy_dtype_promotion('standard'):  # of optax
        params, forward, state = setup(tx)
        step, losses = pj.train_step(weighted(forward), tx), []
        for _ in range(3):
            state, loss = step(params, state, (X, WEIGHTS))
            losses.append(float(loss))
    assert losses[2] <= losses[0] and int(state.skipped) == 0


def test_what_an_optimizer_holds_stays_its_own():
    tx = optax.noisy_sgd(1e-2, key=jax.random.key(1))
    for _ in range(2):  # its key would have been donated with the first state
        with jax.numpy_dtype_promotion('standard'):  # of optax
            params, forward, state = setup(tx)
            state, _ = pj.train_step(weighted(forward), tx)(params, state, (X, WEIGHTS))
    assert int(state.step) == 1


def test_an_optimizer_is_told_the_loss():
    told = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=1.0, accumulation_size=1)
    tx = optax.chain(optax.sgd(1e-6), told)  # no loss is below zero, so none is better
    with jax.numpy_dtype_promotion('standard'):  # of optax
        params, forward, state = setup(tx)
        step = pj.train_step(weighted(forward), tx)
        for _ in range(4):
            state, _ = step(params, state, (X, WEIGHTS))
    assert float(state.opt_state[1].scale) < 1


@pytest.mark.parametrize('accumulate', [1, 3])
def test_the_second_step_compiles_nothing_and_theta_is_as_it_was(accumulate):
    tx, traces = pj.moving_average(optax.sgd(0.1, momentum=0.9), decay=0.9), []
    params, forward, state = setup(tx)

    def loss(params, phi, batch, key):
        traces.append(None)
        return weighted(forward)(params, phi, batch, key)

    step, before = pj.train_step(loss, tx, accumulate=accumulate), bits(params)
    batch = (X, WEIGHTS) if accumulate == 1 else cut((X, WEIGHTS), accumulate)
    state, _ = step(params, state, batch)
    first = len(traces)
    with compiled() as names:
        for _ in range(3):
            state, _ = step(params, state, batch)
    assert first > 0 == len(traces) - first and names == [] and bits(params) == before


def test_what_an_optimizer_makes_of_a_gradient_must_be_finite_too():
    """One that divides by the norm of a gradient has no answer to zeros."""
    direction = lambda grads, phi: jax.tree.map(lambda g: g / optax.tree.norm(grads), grads)
    tx = optax.chain(optax.stateless(direction), optax.sgd(0.1))
    params, forward, state = setup(tx)
    step, fresh = pj.train_step(weighted(forward), tx), bits(state.phi)
    loss = lambda params, phi, batch, key: 0 * (forward(params, phi, batch) ** 2).mean()
    still, value = pj.train_step(loss, tx)(params, setup(tx)[2], X)
    assert float(value) == 0 and bits(still.phi) == fresh
    assert (int(still.step), int(still.skipped)) == (1, 1)
    state, _ = step(params, state, (X, WEIGHTS))
    assert int(state.skipped) == 0 and bits(state.phi) != fresh
