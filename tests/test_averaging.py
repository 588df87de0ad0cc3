"""The moving average of phi: its numbers, and that it goes with the state wherever that goes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from zoo import normal

import peftjax as pj

PARAMS = {'kernel': normal(0, 6, 4)}
X = normal(1, 3, 6)


def model(params, x):
    return jnp.tanh(x @ params['kernel'])


PEFT = pj.attach(pj.Lora(rank=2, target='kernel'), model, PARAMS, X)
FORWARD = PEFT.wrap(model)
TX = pj.moving_average(optax.sgd(0.3, momentum=0.9), decay=0.8)


def loss(params, phi, x, key):
    del key
    return ((FORWARD(params, phi, x) - 1) ** 2).mean() + jnp.where(x.max() > 1e6, jnp.nan, 0)


STEP = pj.train_step(loss, TX)


def fresh(tx=TX):
    return pj.start(tx, PEFT.init(jax.random.key(0), PARAMS), jax.random.key(1))


def bits(tree):
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(raw(leaf)).tobytes() for leaf in jax.tree.leaves(tree)]


def close(a, b, tolerance=1e-6):
    check = lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
    jax.tree.map(check, a, b)


def test_it_is_the_mean_with_falling_weights_and_training_is_as_without_it():
    state, alone = fresh(), fresh(optax.sgd(0.3, momentum=0.9))
    plain, seen = pj.train_step(loss, optax.sgd(0.3, momentum=0.9)), []
    assert bits(pj.averaged(state)) == bits(state.phi)
    for n in range(1, 7):
        state, value = STEP(PARAMS, state, X)
        alone, same = plain(PARAMS, alone, X)
        close((value, state.phi), (same, alone.phi))
        seen.append(jax.device_get(state.phi))
        weights = 0.8 ** np.arange(n - 1, -1, -1)
        by_hand = jax.tree.map(
            lambda *each, w=weights: np.average(np.stack(each).astype(np.float64), 0, w), *seen
        )
        close(jax.device_get(pj.averaged(state)), by_hand)
    assert bits(pj.averaged(state)) != bits(state.phi)


def test_a_decay_of_zero_is_phi_itself():
    tx = pj.moving_average(optax.sgd(0.3), decay=0.0)
    state, step = fresh(tx), pj.train_step(loss, tx)
    for _ in range(3):
        state, _ = step(PARAMS, state, X)
        close(pj.averaged(state), state.phi)


def test_a_step_that_is_not_finite_does_not_count():
    state, _ = STEP(PARAMS, fresh(), X)
    before = bits(state.opt_state)
    state, _ = STEP(PARAMS, state, X.at[0, 0].set(1e7))
    assert int(state.skipped) == 1 and bits(state.opt_state) == before


def test_narrow_phi_is_averaged_in_float32():
    """Each of the moves is below what bfloat16 can tell at 1."""
    tx = pj.moving_average(optax.sgd(1.0), decay=0.999)
    phi = {'w': {'a': jnp.ones(1, jnp.bfloat16)}}
    state = tx.init(phi)
    for _ in range(3):
        updates, state = tx.update({'w': {'a': jnp.full(1, -(2**-7), jnp.bfloat16)}}, state, phi)
        phi = optax.apply_updates(phi, updates)
    average = pj.averaged(state)['w']['a']
    assert phi['w']['a'].dtype == jnp.bfloat16 and average.dtype == jnp.float32
    expected = np.average(1 + np.arange(1, 4) / 128, weights=0.999 ** np.arange(2, -1, -1))
    np.testing.assert_allclose(average, expected, rtol=1e-6)


class Stream:
    """The same batches again and again, which say where they stand."""

    def __init__(self):
        self.count = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.count += 1
        return X * self.count

    def state(self):
        return self.count

    def restore(self, state):
        self.count = state


@pytest.mark.parametrize('at', [1, 4])
def test_a_run_that_goes_on_has_the_average_of_the_unbroken_one(tmp_path, at):
    def train(folder, steps):
        with pj.Checkpoints(folder, PEFT, PARAMS) as saved:
            batches = Stream()
            state = saved.resume(fresh(), batches)
            return pj.fit(STEP, PARAMS, state, batches, steps=steps, checkpoints=saved)

    train(tmp_path / 'cut', at)
    again, unbroken = train(tmp_path / 'cut', 7), train(tmp_path / 'whole', 7)
    assert bits(again) == bits(unbroken)
    assert bits(pj.averaged(again)) == bits(pj.averaged(unbroken)) != bits(unbroken.phi)


def test_it_lies_anywhere_in_a_state():
    inside = optax.chain(optax.clip(1.0), pj.moving_average(optax.adam(0.1), decay=0.5))
    phi = {'lora': fresh().phi, 'head': {'out': {'value': jnp.ones(2)}}}
    each = pj.chain_optimizer({'lora': inside, 'head': optax.sgd(0.1)})
    found = pj.averaged(each.init(phi))
    assert bits(found['lora']) == bits(phi['lora']) and not jax.tree.leaves(found['head'])
    masked = pj.masked_optimizer(TX)
    assert bits(pj.averaged(masked.init({'params': PARAMS, 'phi': phi}))['phi']) == bits(phi)


def test_extra_arguments_are_handed_on():
    seen = []

    def update(updates, state, params=None, *, value):
        seen.append(value)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = pj.moving_average(inner, decay=0.5)
    phi = fresh().phi
    tx.update(phi, tx.init(phi), phi, value=3)
    assert seen == [3]


def test_wrong_calls_say_what_came():
    for decay in (1, -0.1, float('nan')):
        with pytest.raises(ValueError, match='decay must be at least 0 and below 1: received'):
            pj.moving_average(optax.sgd(0.1), decay=decay)
    phi = fresh().phi
    with pytest.raises(ValueError, match='pass it, as update'):
        TX.update(phi, TX.init(phi))
    with pytest.raises(ValueError, match='one average of phi in the state; there are 0'):
        pj.averaged(fresh(optax.sgd(0.1)))
    twice = pj.moving_average(pj.moving_average(optax.sgd(0.1), decay=0.1), decay=0.2)
    two = optax.chain(TX, TX)
    with pytest.raises(ValueError, match='there are 2'):
        pj.averaged(two.init(phi))
    assert bits(pj.averaged(twice.init(phi))) == bits(phi)
