"""The best phi and an early end: what is kept, when a run ends, and that a resumed one agrees."""

import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import compiled
from jax.sharding import NamedSharding, PartitionSpec
from zoo import normal

import peftjax as pj
from peftjax import data

PARAMS = {'embed': normal(0, 20, 6), 'kernel': normal(1, 6, 20)}
SAMPLES = [data.Sample(np.arange(i, i + 4) % 20, np.ones(4, bool)) for i in range(7)]
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


STEP = pj.train_step(loss, TX)


def fresh(tx=TX):
    phi = PEFT.init(jax.random.key(0), PARAMS)
    return pj.start(tx, phi, jax.random.key(1), keep_best=True)


def stream():
    return data.Batches(data.one_per_row(SAMPLES, 4), 2, seed=0, epochs=20)


def bits(tree):
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(raw(leaf)).tobytes() for leaf in jax.tree.leaves(tree)]


def run(evaluate, steps=20, state=None, batches=None, every=1, events=(), step=STEP, **options):
    """One loop with an evaluation; options of `fit` are those that `KeepBest` does not have."""
    own = {name: options.pop(name) for name in ('checkpoints', 'save_every') if name in options}
    return pj.fit(
        step,
        PARAMS,
        fresh() if state is None else state,
        stream() if batches is None else batches,
        steps=steps,
        events=[pj.Every(every, pj.KeepBest(evaluate, **options)), *events],
        **own,
    )


def scripted(values):
    """An evaluation that gives these values, and the phi that it gave them for."""
    seen, left = {}, iter(values)

    def evaluate(step, phi):
        seen[step] = bits(phi)
        return next(left)

    return evaluate, seen


def found(state):
    return int(state.best.step), round(float(state.best.value), 4), int(state.best.stale)


@pytest.mark.parametrize(
    ('values', 'options', 'expected'),
    [
        ([5, 4, 3, 6, 7], {}, (3, 3, 2)),
        ([5, 4, 4, 4], {}, (2, 4, 2)),
        ([0.1, 0.1], {}, (1, 0.1, 1)),  # in float32, as it is kept
        ([5, 4, 6, 7, 3], {'maximize': True}, (4, 7, 1)),
        ([5, 4.5, 4.1, 3.9], {'min_delta': 1}, (4, 3.9, 0)),
        ([5, 4.5, 4.1, 4], {'min_delta': 1}, (1, 5, 3)),
        ([float('nan'), float('inf'), 9, float('nan')], {}, (3, 9, 1)),
        ([float('nan'), -1], {'maximize': True}, (2, -1, 0)),
    ],
)
def test_the_best_is_kept_with_its_phi(values, options, expected):
    evaluate, seen = scripted(values)
    state = run(evaluate, steps=len(values), **options)
    assert found(state) == expected
    assert bits(state.best.phi) == seen[expected[0]]


def test_training_is_as_without_it():
    alone = fresh()._replace(best=None)
    for batch in itertools.islice(stream(), 5):
        alone, _ = STEP(PARAMS, alone, batch)
    state = run(scripted([3, 1, 2, 4, 5])[0], steps=5)
    assert bits(state._replace(best=None)) == bits(alone)


@pytest.mark.parametrize(('patience', 'ends'), [(1, 4), (2, 10), (3, 12), (None, 16)])
def test_a_run_ends_after_evaluations_without_improvement(patience, ends):
    evaluate, seen = scripted([5, 6, 4, 4.5, 4.2, 4.1, 3, 2])
    state = run(evaluate, steps=16, every=2, patience=patience)
    assert int(state.step) == max(seen) == ends


def wavy(step, phi):
    """Up and down as phi moves."""
    del step
    total = sum(float(np.sum(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(phi))
    return np.sin(40 * total)


@pytest.fixture(scope='module')
def unbroken():
    state = run(wavy, every=2, patience=3)
    assert 0 < int(state.best.step) < int(state.step) < 20, 'it ends early, with a best before'
    return state


def checkpoints(folder):
    return pj.Checkpoints(folder, PEFT, PARAMS)


def resumed(folder, patience=3, **options):
    with checkpoints(folder) as saved:
        batches = stream()
        state = saved.resume(fresh(), batches)
        return run(wavy, 20, state, batches, 2, patience=patience, checkpoints=saved, **options)


def stop(at):
    def do(step, state):
        if step == at:
            raise pj.Stop

    return pj.Every(1, do)


@pytest.mark.parametrize('at', [1, 2, 7, 11, 12, 13, 17])
def test_stopped_anywhere_it_ends_as_the_unbroken_run(unbroken, tmp_path, at):
    resumed(tmp_path, events=[stop(at)])
    assert bits(resumed(tmp_path)) == bits(unbroken)


def test_killed_after_a_better_one_it_ends_as_the_unbroken_run(unbroken, tmp_path):
    """What was found after the last checkpoint is found again."""

    def die(step, state):
        if step == int(unbroken.best.step) + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resumed(tmp_path, save_every=3, events=[pj.Every(1, die)])
    with checkpoints(tmp_path) as saved:
        assert saved.steps()[-1] <= int(unbroken.best.step)
    assert bits(resumed(tmp_path, save_every=3)) == bits(unbroken)


def test_a_run_that_was_ended_stays_so_unless_it_may_go_on(unbroken, tmp_path):
    resumed(tmp_path)
    with checkpoints(tmp_path) as saved:
        kept = saved.restore(fresh())
    assert kept is not None and bits(kept.state) == bits(unbroken)
    assert bits(resumed(tmp_path)) == bits(unbroken)
    longer = resumed(tmp_path, patience=30)
    assert int(longer.step) == 20 and bits(longer) == bits(run(wavy, every=2, patience=30))


def test_the_moving_average_is_evaluated_and_kept():
    tx = pj.moving_average(TX, decay=0.5)
    evaluate, seen = scripted([2, 1, 3])
    options = {'state': fresh(tx), 'step': pj.train_step(loss, tx), 'steps': 3}
    state = run(evaluate, of=pj.averaged, **options)
    again, _ = scripted([2, 1, 3])
    two = run(again, of=pj.averaged, **{**options, 'state': fresh(tx), 'steps': 2})
    assert bits(state.best.phi) == bits(pj.averaged(two)) == seen[2] != bits(two.phi)


def test_narrow_phi_stays_narrow():
    phi = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PEFT.init(jax.random.key(0), PARAMS))
    state = pj.start(TX, phi, jax.random.key(1), keep_best=True)
    wide = pj.KeepBest(lambda step, phi: 1.0, of=lambda s: jax.tree.map(jnp.float32, s.phi))
    kept = wide(1, state).best
    assert kept is not None and bits(kept.phi) == bits(phi)


def test_numbers_by_name_and_what_is_logged(caplog):
    evaluate = lambda step, phi: {'loss': 10.0 - step, 'accuracy': [0.5, 0.7, np.nan][step - 1]}
    with caplog.at_level(logging.INFO, 'peftjax'):
        state = run(evaluate, steps=3, by='accuracy', maximize=True)
    assert found(state) == (2, 0.7, 1)
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert said == [
        ('INFO', 'step 1 was evaluated to 0.5, the best so far'),
        ('INFO', 'step 2 was evaluated to 0.7, the best so far'),
        ('WARNING', 'step 3 was evaluated to nan, the best is 0.7 of step 2'),
    ]


def test_events_may_change_the_state():
    """As `KeepBest` does; what is no state is let go."""
    reset = lambda step, state: state._replace(skipped=state.skipped + 7)
    count = pj.Every(2, lambda step, state: int(state.step))
    state = run(lambda step, phi: 1.0, steps=4, events=[pj.At({3}, reset), count])
    assert int(state.skipped) == 7 and int(state.step) == 4


@pytest.mark.parametrize('devices', [1, 8])
def test_a_better_phi_compiles_nothing_anew(devices):
    mesh = jax.make_mesh((devices,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    state = fresh() if devices == 1 else jax.device_put(fresh(), whole)
    step, keep = pj.train_step(loss, TX), pj.KeepBest(lambda step, phi: -step)
    batches = stream()

    def go(state, count):
        state, _ = step(PARAMS, state, next(batches))
        return keep(count, state)

    for count in (1, 2):
        state = go(state, count)
    with compiled() as names:
        for count in (3, 4, 5):
            state = go(state, count)
    assert names == [] and found(state) == (5, -5, 0)
    own, kept = jax.tree.leaves(state.phi), jax.tree.leaves(state.best.phi)
    assert [leaf.sharding for leaf in kept] == [leaf.sharding for leaf in own]


def test_wrong_calls_say_what_came():
    evaluate = lambda step, phi: {'loss': 1.0}
    for name, value in (('min_delta', -1), ('min_delta', float('nan')), ('patience', 0)):
        with pytest.raises(ValueError, match=f'{name} must be at least .*: received {value}'):
            pj.KeepBest(evaluate, **{name: value})
    for patience in (1.5, True):
        with pytest.raises(TypeError, match=f'patience must be an integer: received {patience}'):
            pj.KeepBest(evaluate, patience=patience)
    state = fresh()
    for wrong in (None, 'x', True, 1j, jnp.ones(1), jnp.array(True), jnp.array(1j)):
        for keep in (
            pj.KeepBest(lambda step, phi, wrong=wrong: wrong),
            pj.KeepBest(lambda step, phi, wrong=wrong: {'loss': wrong}, by='loss'),
        ):
            with pytest.raises(TypeError, match='must give a real number: received'):
                keep(1, state)
    for right in (1, 1.0, np.float16(1), np.int64(1), jnp.ones((), jnp.bfloat16), jnp.int8(1)):
        kept = pj.KeepBest(lambda step, phi, right=right: right)(1, state)
        assert found(kept) == (1, 1.0, 0)
    with pytest.raises(ValueError, match=r"number by='accuracy'; it gives \['loss'\]"):
        pj.KeepBest(evaluate, by='accuracy')(1, state)
    with pytest.raises(ValueError, match=r"by=None; it gives \['loss'\]"):
        pj.KeepBest(evaluate)(1, state)
    with pytest.raises(ValueError, match="by='loss'; it gives a number without a name"):
        pj.KeepBest(lambda step, phi: 1.0, by='loss')(1, state)
    with pytest.raises(ValueError, match=r'start\(..., keep_best=True\)'):
        run(evaluate, state=state._replace(best=None))
