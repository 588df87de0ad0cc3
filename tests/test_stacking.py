"""Groups of batches for accumulated gradients: what they are, and that runs go on in them."""

import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from zoo import normal

import peftjax as pj
from peftjax import data

PARAMS = {'embed': normal(0, 20, 6), 'kernel': normal(1, 6, 20)}
SAMPLES = [data.Sample(np.arange(i, i + 4) % 20, np.ones(4, bool)) for i in range(10)]
TX = optax.sgd(0.5, momentum=0.9)


def model(params, ids):
    return jnp.take(params['embed'], ids, axis=0, mode='clip') @ params['kernel']


PEFT = pj.attach(pj.Lora(rank=2, target='kernel'), model, PARAMS, jnp.zeros((2, 4), jnp.int32))
FORWARD = PEFT.wrap(model)


def loss(params, phi, batch, key):
    logits = FORWARD(params, phi, batch.input_ids)
    logits = logits + 0.1 * jax.random.normal(key, logits.shape)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.input_ids)
    return each.mean()


STEP = pj.train_step(loss, TX, accumulate=3)


def fresh():
    return pj.start(TX, PEFT.init(jax.random.key(0), PARAMS), jax.random.key(1))


def stream(epochs=9):
    """Five batches an epoch, so that groups of three pass the ends of epochs."""
    return data.Batches(data.one_per_row(SAMPLES, 4), 2, seed=0, epochs=epochs)


class AsGrain:
    """The same with the names that grain has."""

    def __init__(self):
        self.batches = stream()

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.batches)

    def get_state(self):
        return self.batches.state()

    def set_state(self, state):
        self.batches.restore(state)


def bits(tree):
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(raw(leaf)).tobytes() for leaf in jax.tree.leaves(tree)]


def test_groups_are_the_batches_one_after_the_other():
    groups, plain = pj.Stacked(stream(), 3), stream()
    for group in itertools.islice(groups, 4):
        assert type(group) is data.LanguageBatch
        for i in range(3):
            assert bits(jax.tree.map(lambda x, i=i: x[i], group)) == bits(next(plain))
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(group))


def test_arrays_of_a_device_stay_there():
    batches = [{'x': jnp.full(2, i), 'key': jax.random.key(i)} for i in range(4)]
    first, second = pj.Stacked(batches, 2)
    assert isinstance(first['x'], jax.Array) and second['x'].tolist() == [[2, 2], [3, 3]]
    assert first['key'].shape == (2,)


@pytest.mark.parametrize('make', [stream, AsGrain], ids=['ours', 'grain'])
@pytest.mark.parametrize('at', [1, 2, 5])
def test_a_run_goes_on_within_an_epoch_exactly(tmp_path, make, at):
    def train(folder, steps):
        with pj.Checkpoints(folder, PEFT, PARAMS) as saved:
            batches = pj.Stacked(make(), 3)
            state = saved.resume(fresh(), batches)
            return pj.fit(STEP, PARAMS, state, batches, steps=steps, checkpoints=saved)

    train(tmp_path / 'cut', at)
    again, unbroken = train(tmp_path / 'cut', 8), train(tmp_path / 'whole', 8)
    assert bits(again) == bits(unbroken)


def test_a_position_is_that_of_the_batches():
    groups, plain = pj.Stacked(stream(), 3), stream()
    next(groups)
    for _ in range(3):
        next(plain)
    assert groups.state() == plain.state()
    pairs = pj.Stacked(stream(), 2)
    pairs.restore(groups.state())
    assert bits(jax.tree.map(lambda x: x[0], next(pairs))) == bits(next(plain))


def test_what_is_left_at_the_end_makes_no_group(caplog):
    with caplog.at_level(logging.WARNING, 'peftjax'):
        assert len(list(pj.Stacked(stream(epochs=3), 3))) == 5  # 15 batches
    assert not caplog.text
    groups = pj.Stacked(stream(epochs=1), 3)
    with caplog.at_level(logging.WARNING, 'peftjax'):
        assert len(list(groups)) == 1 and list(groups) == []
    assert caplog.text.count('the last 2 batches make no group of 3: left out') == 1
    with pytest.raises(ValueError, match='batch for each of 2 steps; they ended before step 2'):
        pj.fit(STEP, PARAMS, fresh(), pj.Stacked(stream(epochs=1), 3), steps=2)


def test_wrong_calls_say_what_came(tmp_path):
    with pytest.raises(ValueError, match='parts must be at least 1: received 0'):
        pj.Stacked([], 0)
    odd = [{'x': np.zeros((2, 3), np.float32)}, {'x': np.zeros((1, 3), np.float32)}]
    with pytest.raises(ValueError, match=r"float32\[2, 3\], float32\[1, 3\] at batch\['x'\]"):
        next(pj.Stacked(odd, 2))
    with pytest.raises(ValueError, match=r'int64\[\], float64\[\] at batch\. Pad'):
        next(pj.Stacked([1, 2.0], 2))
    with pj.Checkpoints(tmp_path, PEFT, PARAMS) as saved:
        with pytest.raises(TypeError, match='must say where they stand.*got list_iterator'):
            saved.resume(fresh(), pj.Stacked([1], 1))
