"""The loop: resumed runs are the unbroken one; signals, steps that are not finite, transfers."""

import itertools
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import compiled
from zoo import normal

import peftjax as pj
from peftjax import data

pytestmark = pytest.mark.optimized

PARAMS = {'embed': normal(0, 20, 6), 'kernel': normal(1, 6, 20)}
SAMPLES = [data.Sample(np.arange(i, i + 4) % 20, np.ones(4, bool)) for i in range(7)]
TX = optax.sgd(0.5, momentum=0.9)


def model(params, ids):
    return jnp.take(params['embed'], ids, axis=0, mode='clip') @ params['kernel']


IDS = jnp.zeros((2, 4), jnp.int32)
PEFT = pj.attach(pj.Lora(rank=2, target='kernel'), model, PARAMS, IDS)
FORWARD = PEFT.wrap(model)


def loss(params, phi, batch, key):
    """With noise, as dropout would be; a batch that holds token 99 has no finite loss."""
    logits = FORWARD(params, phi, batch.input_ids)
    logits = logits + 0.1 * jax.random.normal(key, logits.shape)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.input_ids % 20)
    return each.mean() + jnp.where((batch.input_ids == 99).any(), jnp.nan, 0)


STEP = pj.train_step(loss, TX)


def fresh():
    return pj.start(TX, PEFT.init(jax.random.key(0), PARAMS), jax.random.key(1))


def stream(seed=0, samples=SAMPLES):
    """Four batches an epoch, the last of them half empty."""
    return data.Batches(data.one_per_row(samples, 4), 2, seed=seed, epochs=10)


def checkpoints(folder, **options):
    return pj.Checkpoints(folder, PEFT, PARAMS, settings={'seed': 0}, **options)


def bits(tree):
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(raw(leaf)).tobytes() for leaf in jax.tree.leaves(tree)]


def run(steps=14, state=None, batches=None, **options):
    seen = []
    state = pj.fit(
        STEP,
        PARAMS,
        fresh() if state is None else state,
        stream() if batches is None else batches,
        steps=steps,
        on_loss=lambda step, value: seen.append((step, value)),
        **options,
    )
    return bits(state), seen


def stop(at):
    def do(step, state):
        if step == at:
            raise pj.Stop

    return pj.Every(1, do)


def terminate(at):
    def do(step, state):
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    return pj.Every(1, do)


@pytest.fixture(scope='module')
def unbroken():
    return run()


def test_the_loop_is_what_anyone_would_write(unbroken):
    state, seen = fresh(), []
    for i, batch in enumerate(itertools.islice(stream(), 14), 1):
        state, value = STEP(PARAMS, state, batch)
        seen.append((i, float(value)))
    assert (bits(state), seen) == unbroken
    assert run(fetch_every=3) == run(fetch_every=100) == unbroken


@pytest.mark.parametrize('at', range(1, 14))
def test_stopped_anywhere_a_run_goes_on_as_if_it_had_not(unbroken, tmp_path, at):
    with checkpoints(tmp_path) as saved:
        _, first = run(checkpoints=saved, events=[stop(at)])
    with checkpoints(tmp_path) as saved:
        batches = stream()
        state = saved.resume(fresh(), batches)
        assert int(state.step) == at
        last, rest = run(state=state, batches=batches, checkpoints=saved)
        assert saved.steps()[-1] == 14
        whole = saved.resume(fresh(), stream())
        assert run(state=whole) == (unbroken[0], [])  # nothing is left to do
    assert (last, first + rest) == unbroken


def test_sigterm_ends_a_run_with_a_checkpoint(unbroken, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with checkpoints(tmp_path) as saved:
        with pytest.raises(pj.Terminated) as end:
            run(checkpoints=saved, events=[terminate(5)])
        assert end.value.code == 143 and saved.steps() == [5]
    assert signal.getsignal(signal.SIGTERM) == before
    with checkpoints(tmp_path) as saved:
        batches = stream()
        state = saved.resume(fresh(), batches)
        assert run(state=state, batches=batches)[0] == unbroken[0]
    assert run(events=[terminate(14)]) == unbroken  # all was done already


def test_a_killed_process_loses_one_interval_at_most(unbroken, tmp_path):
    """`kill -9` between two steps, and while a checkpoint is being written."""
    program = (
        'import os, sys\n'
        'sys.path[:0] = sys.argv[1:3]\n'
        'import test_loop as t, peftjax as pj\n'
        'from peftjax import _manifest\n'
        'def die(*_): os._exit(9)\n'
        'saved = t.checkpoints(sys.argv[3])\n'
        'batches = t.stream()\n'
        'state = saved.resume(t.fresh(), batches)\n'
        'first, how = int(state.step), sys.argv[4]\n'
        'if how == "seal":\n'
        '    seal = _manifest.seal\n'
        '    _manifest.seal = lambda f, w: die() if f.name == "9" else seal(f, w)\n'
        'events = [pj.Every(8, die)] if how == "step" else []\n'
        'last, _ = t.run(state=state, batches=batches, checkpoints=saved, save_every=3,\n'
        '                events=events)\n'
        'saved.close()\n'
        'print(first, [x.hex() for x in last])\n'
    )
    here, home = str(pathlib.Path(__file__).parent), str(pathlib.Path(pj.__file__).parents[1])

    def go(how):
        command = [sys.executable, '-c', program, here, home, str(tmp_path), how]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert go('step').returncode == 9
    assert go('seal').returncode == 9
    ended = go('end')
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f'6 {[x.hex() for x in unbroken[0]]}\n'


def bad(*steps):
    """Batches, of which those of some steps have no finite loss."""
    for i, batch in enumerate(stream(), 1):
        ids = np.full_like(batch.input_ids, 99) if i in steps else batch.input_ids
        yield batch._replace(input_ids=ids)


def test_steps_that_are_not_finite_are_skipped_and_counted(caplog):
    with caplog.at_level(logging.WARNING, 'peftjax'):
        last, seen = run(batches=bad(3, 7, 8))
    assert [step for step, value in seen if not np.isfinite(value)] == [3, 7, 8]
    assert [f'step {i} made no update' in caplog.text for i in (3, 7, 8, 9)] == [1, 1, 1, 0]
    state = fresh()
    for i, batch in enumerate(itertools.islice(stream(), 14), 1):
        if i in (3, 7, 8):
            state = state._replace(step=state.step + 1, skipped=state.skipped + 1)
        else:
            state, _ = STEP(PARAMS, state, batch)
    assert last == bits(state)


def test_too_many_in_a_row_end_the_training():
    with pytest.raises(pj.NotFiniteError, match=r'step 6 are not .*loss is nan\), 3 in a row'):
        run(batches=bad(2, 4, 5, 6), patience=3)
    with pytest.raises(pj.NotFiniteError, match='step 2 are not'):
        run(batches=bad(2, 4), not_finite='stop')


def test_a_gradient_alone_is_found_too(caplog):
    def odd(params, phi, x, key):
        value = (phi['kernel']['a'] ** 2).sum()
        return value + 0 * jnp.sqrt(jnp.where(x > 0, value - value, 1))

    with caplog.at_level(logging.WARNING, 'peftjax'):
        state = pj.fit(
            pj.train_step(odd, TX), PARAMS, fresh(), iter([0.0, 1.0, 0.0]), steps=3, patience=2
        )
    assert int(state.skipped) == 1 and 'step 2 made no update' in caplog.text


def test_restoring_goes_on_from_the_newest_checkpoint(tmp_path, caplog):
    with checkpoints(tmp_path) as saved:
        batches = Counted(bad(6))
        with caplog.at_level(logging.WARNING, 'peftjax'):
            run(steps=8, batches=batches, checkpoints=saved, save_every=4, not_finite='restore')
        assert 'those of step 4 again' in caplog.text
        found, earlier = saved.restore(fresh()), saved.restore(fresh(), step=4)
        assert found is not None and earlier is not None and found.step == 8
        for name in ('phi', 'opt_state'):
            assert bits(getattr(found.state, name)) == bits(getattr(earlier.state, name))
        assert int(found.state.skipped) == 1
    with checkpoints(tmp_path / 'other') as saved:
        with pytest.raises(pj.NotFiniteError, match='nothing was saved yet'):
            run(batches=Counted(bad(1)), checkpoints=saved, not_finite='restore')
    with pytest.raises(ValueError, match='needs checkpoints'):
        run(not_finite='restore')


@pytest.mark.parametrize('cuts', [(7,), (9,), (10,), (5, 6, 7, 8, 9), (8, 10, 11, 12)])
@pytest.mark.parametrize('options', [{'save_every': 5, 'fetch_every': 3}, {'save_every': 4}])
def test_restoring_ends_as_the_unbroken_run(tmp_path, cuts, options):
    """Whether a cut lets a loss be seen early, or leaves a checkpoint that the other has not."""

    def part(folder, steps, events=()):
        with checkpoints(folder) as saved:
            batches = Counted(bad(6, 10))
            state = saved.resume(fresh(), batches)
            return run(
                steps, state, batches, checkpoints=saved, events=events, not_finite='restore',
                **options,
            )[0]  # fmt: skip

    unbroken = part(tmp_path / 'unbroken', 14)
    plain = run(steps=14, batches=bad(6, 10))[0]
    assert unbroken[:2] != plain[:2], 'phi was restored'
    for i, cut in enumerate(cuts):
        if i % 2:
            part(tmp_path / 'cut', cut)
        else:
            part(tmp_path / 'cut', 14, [stop(cut)])
    assert part(tmp_path / 'cut', 14) == unbroken
    kept = lambda name: sorted(path.name for path in (tmp_path / name / 'steps').iterdir())
    assert kept('cut') == kept('unbroken')


@pytest.mark.parametrize('cut', [3, 5, 6])
def test_steps_in_a_row_are_counted_across_a_cut(tmp_path, cut):
    for steps in (cut, 12):
        with checkpoints(tmp_path) as saved:
            batches = Counted(bad(4, 5, 6, 7))
            state = saved.resume(fresh(), batches)
            options = {'batches': batches, 'checkpoints': saved, 'patience': 4}
            if steps == cut:
                run(steps, state, **options)
            else:
                with pytest.raises(pj.NotFiniteError, match='step 7 are not .* 4 in a row'):
                    run(steps, state, **options)


def test_a_run_that_forgot_to_resume_is_refused_before_its_first_step(tmp_path):
    with checkpoints(tmp_path) as saved:
        run(steps=4, checkpoints=saved, save_every=2)
    with checkpoints(tmp_path) as saved:
        with pytest.raises(ValueError, match=r'holds \[2, 4\], and none was taken'):
            run(batches=Unkept({'seed': 3}), checkpoints=saved)
        saved.resume(fresh(), stream())
        with pytest.raises(ValueError, match='from its step 4: received a state of step 0'):
            run(batches=Unkept({'seed': 3}), checkpoints=saved)


class Counted:
    """An iterator as grain's are."""

    def __init__(self, batches):
        self.batches, self.count = batches, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.count += 1
        return next(self.batches)

    def get_state(self):
        return {'count': self.count}

    def set_state(self, state):
        for _ in range(state['count']):
            next(self)


def test_iterators_of_grain_go_on_too(unbroken, tmp_path):
    with checkpoints(tmp_path) as saved:
        run(steps=9, batches=Counted(stream()), checkpoints=saved)
        batches = Counted(stream())
        state = saved.resume(fresh(), batches)
        assert run(state=state, batches=batches)[0] == unbroken[0]


def test_another_stream_is_refused(tmp_path):
    with checkpoints(tmp_path) as saved:
        run(steps=2, checkpoints=saved)
        with pytest.raises(ValueError, match='seed was 0 and is 1 now'):
            saved.resume(fresh(), stream(seed=1))
        with pytest.raises(ValueError, match='rows was'):
            saved.resume(fresh(), stream(samples=SAMPLES[:6]))


def test_wrong_calls_say_what_came(tmp_path):
    with pytest.raises(ValueError, match='batch for each of 50 steps; they ended before step 41'):
        run(steps=50)
    with pytest.raises(ValueError, match='fetch_every must be at least 1: received 0'):
        run(fetch_every=0)
    with pytest.raises(ValueError, match=r'events\[0\].steps must be at least 1'):
        run(events=[pj.Every(0, print)])
    with pytest.raises(ValueError, match="'skip', 'stop' or 'restore': got 'ignore'"):
        run(not_finite='ignore')
    for wrong, said in (
        ({'batches': [1]}, 'an iterator: received list. Give iter'),
        ({'events': pj.Every(1, print)}, 'a list of pj.Every and pj.At: received Every'),
        ({'events': [pj.Every(2.5, print)]}, r'events\[0\].steps must be an integer'),
        ({'events': [pj.At(3, print)]}, r'events\[0\].steps must be a set of steps: received 3'),
        ({'events': [pj.At(iter([3]), print)]}, 'a set of steps: received <list_iterator'),
        ({'save_every': 2.0}, 'save_every must be an integer: received 2.0'),
    ):
        with pytest.raises(TypeError, match=said):
            run(**wrong)
    with checkpoints(tmp_path) as saved:
        with pytest.raises(TypeError, match='must say where they stand.*got list_iterator'):
            run(batches=iter([1]), checkpoints=saved)


class Unkept:
    """An iterator that gives nothing, and whose state JSON does not keep where it is of NumPy."""

    def __init__(self, where):
        self.where = where

    def __iter__(self):
        return self

    def __next__(self):
        raise AssertionError('no step is to be made')

    def state(self):
        return self.where

    def restore(self, state):
        raise AssertionError(state)


def test_a_stream_whose_place_is_not_kept_is_refused_before_the_first_step(tmp_path):
    with checkpoints(tmp_path) as saved:
        with pytest.raises(TypeError, match=r"where Unkept stands .* 'seed' is np.int64\(3\)"):
            run(batches=Unkept({'seed': np.int64(3)}), checkpoints=saved)


def test_a_stack_of_states_is_refused(tmp_path):
    state = pj.stack([fresh(), fresh()])
    with pytest.raises(TypeError, match='fit trains one state; got a stack of 2'):
        pj.fit(STEP, PARAMS, state, stream(), steps=3)
    with checkpoints(tmp_path) as saved:
        with pytest.raises(TypeError, match='a checkpoint is of one state; got a stack of 2'):
            saved.save(state)


def test_losses_are_fetched_in_groups_and_nothing_else_is(monkeypatch):
    fetched, get = [], jax.device_get
    monkeypatch.setattr(jax, 'device_get', lambda x: fetched.append(len(x)) or get(x))
    run(steps=40, fetch_every=10)
    assert fetched == [9, 10, 10, 11]


def test_batches_on_the_device_are_all_that_a_step_needs():
    """The host hands over nothing, from the first step on."""
    there = [jax.device_put(batch) for batch in itertools.islice(stream(), 14)]
    state = fresh()
    with jax.transfer_guard_host_to_device('disallow'):
        last, seen = run(state=state, batches=iter(there), fetch_every=3)
    assert (last, seen) == run()
    with pytest.raises(Exception, match='Disallowed host-to-device'):  # the guard sees a step
        with jax.transfer_guard_host_to_device('disallow'):
            run(steps=1)


def test_after_the_first_step_nothing_is_compiled(tmp_path):
    """Not by a checkpoint either, nor by what happens between steps, nor where a run goes on."""
    step = pj.train_step(loss, TX)

    def train(steps):
        with checkpoints(tmp_path) as saved:
            batches = stream()
            state = saved.resume(fresh(), batches)
            options = {'checkpoints': saved, 'save_every': 2, 'fetch_every': 3}
            with compiled() as names:
                pj.fit(step, PARAMS, state, batches, steps=steps, **options)
            return names

    assert train(4).count('jit(step)') == 1
    assert train(9) == []


def test_it_runs_beside_the_main_thread(unbroken):
    found = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    assert found == [unbroken]
