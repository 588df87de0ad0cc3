"""Checkpoints of a run: bit for bit, sealed, of one run and one writer."""

import contextlib
import errno
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from zoo import normal

import peftjax as pj
from peftjax import _pieces, _steps
from peftjax.checkpoint import CheckpointError

pytestmark = pytest.mark.optimized

PARAMS = {'up': {'kernel': normal(0, 6, 4)}, 'down': {'kernel': normal(1, 4, 6)}}
X = normal(2, 5, 6)
TX = optax.sgd(optax.linear_schedule(0.1, 0.0, 8), momentum=0.9)


def model(params, x):
    return x + jnp.tanh(x @ params['up']['kernel']) @ params['down']['kernel']


def attach(**fields):
    return pj.attach(pj.Lora(**{'rank': 2, 'target': 'kernel', **fields}), model, PARAMS, X)


PEFT = attach()
FORWARD = PEFT.wrap(model)


def fresh(peft=PEFT, dtype=jnp.float32):
    phi = jax.tree.map(lambda x: x.astype(dtype), peft.init(jax.random.key(0), PARAMS))
    return pj.start(TX, phi, jax.random.key(1))


def at(step):
    """A state after so many steps, which tells by its phi that it is."""
    phi = jax.tree.map(lambda x: jnp.full_like(x, step), fresh().phi)
    return fresh()._replace(phi=phi, step=jnp.int32(step))


def loss(params, phi, x, key):
    noisy = x + 0.1 * jax.random.normal(key, x.shape)
    return (FORWARD(params, phi, noisy) ** 2).mean()


STEP = pj.train_step(loss, TX)


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion('standard'):  # of optax's schedules
        yield


def bits(tree):
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(raw(leaf)).tobytes() for leaf in jax.tree.leaves(tree)]


def checkpoints(folder, peft=PEFT, params=PARAMS, **options):
    return pj.Checkpoints(folder, peft, params, **{'settings': {'seed': 0}, **options})


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    """A run with its states, and its losses."""
    with jax.numpy_dtype_promotion('standard'):
        folder, state = tmp_path_factory.mktemp('run'), fresh()
        states, losses = [], []
        with checkpoints(folder, keep=9) as saved:
            for i in range(6):
                saved.save(state, data={'seen': i})
                states.append(bits(state))
                state, value = STEP(PARAMS, state, X)
                losses.append(float(value))
        return folder, states, losses, bits(state)


@pytest.fixture
def folder(ran, tmp_path):
    copied = tmp_path / 'run'
    subprocess.run(['cp', '-r', ran[0], copied], check=True)
    return copied


def test_every_step_goes_on_as_the_unbroken_run(ran):
    """A state is saved, then donated at once: what is on disk is what it was before."""
    folder, states, losses, last = ran
    with checkpoints(folder, keep=9) as saved:
        assert saved.steps() == [0, 1, 2, 3, 4, 5]
        for step in saved.steps():
            restored = saved.restore(fresh(), step=step)
            assert restored is not None and restored.data == {'seen': step}
            assert bits(restored.state) == states[step]
            state, rest = restored.state, []
            for _ in range(6 - step):
                state, value = STEP(PARAMS, state, X)
                rest.append(float(value))
            assert rest == losses[step:] and bits(state) == last


def test_an_earlier_state_is_of_the_course_that_the_run_is_on(folder):
    with checkpoints(folder, keep=9) as saved:
        assert saved.earlier(fresh(), 2).step == 4
        saved.restore(fresh(), step=3)
        assert saved.earlier(fresh(), 2).step == 2


def test_dtypes_keys_and_empty_arrays_come_back(tmp_path):
    state = fresh(dtype=jnp.bfloat16)
    state = state._replace(
        opt_state=(state.opt_state, {'none': jnp.zeros((0, 3)), 'odd': jnp.array([jnp.inf, -0.0])}),
        key=jax.random.key(7, impl='rbg'),
    )
    with checkpoints(tmp_path) as saved:
        assert saved.restore(state) is None
        saved.save(state)
        restored = saved.restore(jax.tree.map(jnp.zeros_like, state))
    assert restored is not None and restored.data is None
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert bits(restored.state) == bits(state)
    kinds = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
    assert kinds(restored.state) == kinds(state)


def test_on_a_mesh_what_was_read_goes_along_with_theta(tmp_path):
    """A fresh state that belongs to no device must not come back as one of the first device."""
    mesh = jax.make_mesh((2,), ('model',), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec('model'))
    params, bound = jax.device_put(PARAMS, sharding), jax.device_put(fresh().phi, sharding)
    with checkpoints(tmp_path) as saved:
        saved.save(STEP(params, fresh(), X)[0])
        for like in (fresh(), fresh()._replace(phi=bound)):
            found = saved.restore(like)
            assert found is not None
            for new, old in zip(*map(jax.tree.leaves, (found.state, like)), strict=True):
                assert new.committed == old.committed
                assert not old.committed or new.sharding == old.sharding
            state, value = STEP(params, found.state, X)
            assert int(state.step) == 2 and np.isfinite(value)


def test_large_states_are_stored_in_pieces(tmp_path, monkeypatch, caplog):
    """With names of their own: a path may be one that no file can have."""
    monkeypatch.setattr(_pieces, 'LARGE', 0)
    monkeypatch.setattr(_pieces, 'PIECE', 2**10)
    big = np.random.default_rng(0).random((40, 100), np.float32)
    state = fresh(dtype=jnp.bfloat16)
    state = state._replace(opt_state={'../odd' * 60: jnp.array(big), 'none': jnp.zeros((0, 3))})
    with caplog.at_level(logging.WARNING), checkpoints(tmp_path) as saved:
        saved.save(state, data=[1])
        restored = saved.restore(jax.tree.map(jnp.zeros_like, state))
        assert restored is not None and bits(restored.state) == bits(state)
        assert 'OCDBT' not in caplog.text
        pieces = [path for path in (tmp_path / 'steps/0/pieces').rglob('*') if path.is_file()]
        assert len(pieces) > 16 and max(path.stat().st_size for path in pieces) < 2**12
        damage(max(pieces, key=lambda path: path.stat().st_size), 'flipped')
        with pytest.raises(CheckpointError, match='was changed'):
            saved.restore(state)


def test_the_newest_stay(tmp_path):
    state = fresh()
    with checkpoints(tmp_path, keep=2) as saved:
        for _ in range(5):
            saved.save(state)
            state, _ = STEP(PARAMS, state, X)
        assert saved.steps() == [3, 4]
        saved.save(state._replace(step=jnp.int32(4)))  # once more: replaced
        assert saved.steps() == [3, 4]
        restored = saved.restore(fresh())
    assert restored is not None and bits(restored.state.phi) == bits(state.phi)


def test_what_was_cut_off_does_not_count_and_goes(folder, caplog):
    (folder / 'steps/5/manifest.json').unlink()  # killed between the last file and the seal
    (folder / 'steps/6.orbax-checkpoint-tmp').mkdir()
    (folder / 'steps/6.orbax-checkpoint-tmp/part').write_text('x')
    with caplog.at_level(logging.WARNING, 'peftjax'), checkpoints(folder, keep=9) as saved:
        assert saved.steps() == [0, 1, 2, 3, 4]
        restored = saved.restore(fresh())
    assert caplog.text.count('was never finished: it is removed') == 2
    assert restored is not None and restored.step == 4
    assert sorted(path.name for path in (folder / 'steps').iterdir()) == list('01234')


def damage(path: pathlib.Path, how: str) -> None:
    content = path.read_bytes()
    if how == 'deleted':
        path.unlink()
    elif how == 'cut':
        path.write_bytes(content[:-1])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.mark.parametrize('how', ['deleted', 'cut', 'flipped'])
def test_damage_is_always_found(ran, tmp_path, how, caplog):
    """Each file of the newest step, but for its seal, without which it does not count."""
    newest = ran[0] / 'steps/5'
    files = [path.relative_to(newest) for path in newest.rglob('*') if path.is_file()]
    files = [file for file in files if how != 'deleted' or file.name != 'manifest.json']
    assert len(files) > 8
    for i, file in enumerate(files):
        if not (newest / file).stat().st_size:
            continue
        copied = tmp_path / str(i)
        subprocess.run(['cp', '-r', ran[0], copied], check=True)
        damage(copied / 'steps/5' / file, how)
        with checkpoints(copied, keep=9) as saved:
            with pytest.raises(CheckpointError, match='fall_back') as error:
                saved.restore(fresh())
            assert str(copied / 'steps/5') in str(error.value)
            caplog.clear()
            with caplog.at_level(logging.WARNING, 'peftjax'):
                restored = saved.restore(fresh(), fall_back=True)
        assert restored is not None and bits(restored.state) == ran[1][4]
        assert 'step 5 is damaged' in caplog.text


def test_nothing_whole_is_an_error(folder):
    for step in range(6):
        damage(folder / f'steps/{step}/_CHECKPOINT_METADATA', 'cut')
    with checkpoints(folder, keep=9) as saved:
        with pytest.raises(CheckpointError, match=r'of \[5, 4, 3, 2, 1, 0\] in .* none is'):
            saved.restore(fresh(), fall_back=True)


def test_falling_back_from_a_chosen_step_takes_none_after_it(ran, folder):
    damage(folder / 'steps/3/_CHECKPOINT_METADATA', 'cut')
    with checkpoints(folder, keep=9) as saved:
        restored = saved.restore(fresh(), step=3, fall_back=True)
    assert restored is not None and restored.step == 2 and bits(restored.state) == ran[1][2]


def test_another_run_is_refused_and_what_differs_is_named(folder):
    other = {**PARAMS, 'down': {'kernel': PARAMS['down']['kernel'] + 1}}
    cases = {
        "seed was 0 and is 1 now; data was None and is 'b' now": {
            'settings': {'seed': 1, 'data': 'b'}
        },
        'the method was Lora.*rank=2.* and is Lora.*rank=3.* now': {'peft': attach(rank=3)},
        "theta holds other values at 1 paths, such as 'down/kernel'": {'params': other},
    }
    before = (folder / 'run.json').read_bytes()
    for message, changes in cases.items():
        with pytest.raises(ValueError, match=f'the folder of another run: {message}'):
            checkpoints(folder, **changes)
    assert (folder / 'run.json').read_bytes() == before
    # said outright, a setting may be another; the lock of those refused is gone
    with checkpoints(folder, settings={'seed': 1}, other_settings=('seed',), keep=9) as saved:
        assert saved.steps() == [0, 1, 2, 3, 4, 5]


def test_a_damaged_run_file_is_named(folder):
    (folder / 'run.json').write_text('{"format"')
    with pytest.raises(CheckpointError, match=r'run.json.* must hold JSON'):
        checkpoints(folder)


@pytest.mark.parametrize('field', ['method', 'peft', 'fingerprint', 'settings'])
@pytest.mark.parametrize('value', [None, 3, {}, {'type': 'Fingerprint'}], ids=str)
def test_a_field_of_a_run_file_that_is_of_another_kind_is_named(folder, field, value):
    path = folder / 'run.json'
    body = json.loads(path.read_text())
    path.write_text(json.dumps(body | {field: value}))
    reason = 'must say what the run is made of; it is damaged'
    if field == 'settings' and isinstance(value, dict):  # a table like any other
        reason = 'folder of another run: .*seed was None and is 0 now'
    elif field == 'peft' and isinstance(value, dict):
        reason = 'the sites that the method is attached to are others'
    with pytest.raises((CheckpointError, ValueError), match=reason):
        checkpoints(folder)
    assert json.loads(path.read_text())[field] == value


def test_a_plan_that_was_written_before_a_field_was_known_is_the_same(folder):
    path = folder / 'run.json'
    body = json.loads(path.read_text())
    first = body['peft']['Peft']['sites'][0][0]['Site']
    del first['scale']
    path.write_text(json.dumps(body))
    with checkpoints(folder) as saved:
        assert saved.steps() == [0, 1, 2, 3, 4, 5]
    for changes in ({'offset': 1}, {'unknown': None}):
        body['peft']['Peft']['sites'][0][0]['Site'] = first | changes
        path.write_text(json.dumps(body))
        with pytest.raises(ValueError, match='the sites that the method is attached to are others'):
            checkpoints(folder)


def test_what_is_not_of_a_run_is_left_alone(tmp_path):
    """A folder that happens to be called steps, and strange files beside our own steps."""
    (tmp_path / 'steps').mkdir()
    (tmp_path / 'steps/notes.txt').write_text('x')
    with pytest.raises(FileExistsError, match="needs a folder without 'steps'"):
        checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['lock', 'notes.txt', 'steps']
    run = tmp_path / 'run'
    with checkpoints(run) as saved:
        saved.save(fresh())
    (run / 'steps/notes.txt').write_text('x')
    with checkpoints(run) as saved:
        assert saved.steps() == [0]
    assert (run / 'steps/notes.txt').read_text() == 'x'


def test_a_state_of_other_shapes_is_refused(folder):
    like = fresh()
    wide = jax.tree.map(lambda x: x[..., None], like.phi)
    with checkpoints(folder, keep=9) as saved:
        with pytest.raises(ValueError, match=r"state of step 5 .*'phi/.*/a' has .*, not "):
            saved.restore(like._replace(phi=wide))
        with pytest.raises(ValueError, match=r"'opt_state/.*' is unknown"):
            saved.restore(like._replace(opt_state=()))
        with pytest.raises(ValueError, match='there is no step 9'):
            saved.restore(like, step=9)


def test_a_folder_has_one_writer(tmp_path):
    with checkpoints(tmp_path):
        with pytest.raises(BlockingIOError, match=rf'process {os.getpid()} of .* is writing'):
            checkpoints(tmp_path)
    checkpoints(tmp_path).close()


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    program = (
        'import pathlib, sys, time\n'
        'from peftjax._lock import Lock\n'
        'lock = Lock(pathlib.Path(sys.argv[1]))\n'
        'print("held", flush=True)\n'
        'time.sleep(60)\n'
    )
    child = subprocess.Popen(
        [sys.executable, '-c', program, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == 'held\n'
        with pytest.raises(BlockingIOError, match=f'process {child.pid} of '):
            checkpoints(tmp_path)
        child.send_signal(signal.SIGKILL)
        child.wait()
    checkpoints(tmp_path).close()


def test_a_full_disk_leaves_what_was_there(folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, 'No space left on device')

    state = at(6)
    saved = checkpoints(folder, keep=9)
    saved.restore(state)
    monkeypatch.setattr(_steps._manifest, 'seal', full)
    saved.save(state)
    with pytest.raises(OSError, match=r'step 6 could not be saved \(\d+ bytes\) in .*run') as error:
        saved.close()
    assert error.value.errno == errno.ENOSPC
    assert sorted(path.name for path in (folder / 'steps').iterdir()) == list('012345')
    monkeypatch.undo()
    with checkpoints(folder, keep=9) as saved:
        assert saved.steps() == [0, 1, 2, 3, 4, 5]
        saved.restore(state)
        saved.save(state)
        assert saved.steps()[-1] == 6
    assert not [path for path in folder.rglob('*') if 'tmp' in path.name or 'part' in path.name]


def test_what_is_still_being_written_when_a_step_fails_goes_too(folder, monkeypatch):
    """TensorStore goes on with writes that it has begun, after another one failed."""

    def late(made):
        for number in range(50):
            with contextlib.suppress(OSError):  # removed between the two
                made.mkdir(parents=True, exist_ok=True)
                (made / str(number)).write_text('late')
            time.sleep(0.01)

    def failing(self, step, **kwargs):
        made = folder / 'steps' / f'{step}.orbax-checkpoint-tmp' / 'd'
        writing.append(threading.Thread(target=late, args=(made,)))
        writing[0].start()
        raise ValueError("File too large [os_error_code='27']")  # as TensorStore says it

    writing: list[threading.Thread] = []
    saved = checkpoints(folder, keep=9)
    saved.restore(fresh())
    monkeypatch.setattr(type(saved._steps._manager), 'save', failing)
    saved.save(at(6))
    with pytest.raises(OSError, match='File too large') as error:
        saved.close()
    assert error.value.errno == errno.EFBIG
    writing[0].join()
    assert sorted(path.name for path in (folder / 'steps').iterdir()) == list('012345')


def test_saving_goes_on_beside_the_next_step(tmp_path, monkeypatch):
    write, order = _steps.Steps.write, []

    def slow(self, *args):
        time.sleep(0.2)
        write(self, *args)
        order.append('written')

    monkeypatch.setattr(_steps.Steps, 'write', slow)
    with checkpoints(tmp_path) as saved:
        saved.save(fresh())
        order.append('back')
        assert saved.steps() == [0]
    assert order == ['back', 'written']


def test_what_json_does_not_keep_is_refused_at_once(tmp_path):
    with checkpoints(tmp_path) as saved:
        with pytest.raises(TypeError, match='not JSON serializable'):
            saved.save(fresh(), data={'x': jnp.ones(2)})
        with pytest.raises(TypeError, match=r"made of arrays; 'opt_state' is 3"):
            saved.save(fresh()._replace(opt_state=3))
        assert saved.steps() == []
    with pytest.raises(TypeError, match=r"settings must be .* 'seed' is np.int64\(3\)"):
        checkpoints(tmp_path / 'other', settings={'seed': np.int64(3)})
    with pytest.raises(ValueError, match='keep must be at least 1'):
        checkpoints(tmp_path, keep=0)
    for keep in (1.5, True):
        with pytest.raises(TypeError, match=f'keep must be an integer: received {keep}'):
            checkpoints(tmp_path / 'keep', keep=keep)
    assert not (tmp_path / 'keep').exists()


def test_two_arrays_of_one_path_are_refused(tmp_path):
    state = fresh()._replace(opt_state={'a/b': jnp.ones(3), 'a': {'b': jnp.zeros(3)}})
    with checkpoints(tmp_path) as saved:
        with pytest.raises(ValueError, match="path of its own; 'opt_state/a/b' names two"):
            saved.save(state)
        with pytest.raises(ValueError, match="'opt_state/a/b' names two"):
            saved.save(fresh())
            saved.restore(state)


def test_arrays_of_numpy_come_back_as_a_step_takes_them(tmp_path):
    """JAX has one order of bytes, and no doubles unless it is told to."""
    values = np.arange(6.0).reshape(2, 3) / 7
    odd = {
        'order': values.astype('>f4'),
        'double': values,
        'count': np.int64(3),
        'none': values[:0],
    }
    state = fresh()._replace(opt_state=odd)
    with checkpoints(tmp_path) as saved:
        saved.save(state)
        for like in (state, saved.restore(state).state):
            restored = saved.restore(like)
            assert restored is not None
            for name, leaf in restored.state.opt_state.items():
                want = jnp.asarray(odd[name].astype(odd[name].dtype.newbyteorder('=')))
                assert leaf.dtype == want.dtype and bits(leaf) == bits(want)


def test_what_orbax_does_not_store_is_no_failure_of_the_disk(tmp_path, monkeypatch):
    def unknown(self, step, **kwargs):
        raise ValueError('Error parsing object member "dtype": Unsupported data type: "uint4"')

    with checkpoints(tmp_path) as saved:
        monkeypatch.setattr(type(saved._steps._manager), 'save', unknown)
        saved.save(fresh())
        with pytest.raises(ValueError, match=r'step 0 could not .*"uint4".*a state that Orbax'):
            saved.wait()
        assert saved.steps() == []


def test_settings_that_are_not_a_number_are_the_same_again(tmp_path):
    odd = {'x': float('nan'), 'deep': [{'y': float('nan'), 'z': float('inf')}]}
    for _ in range(2):
        checkpoints(tmp_path, settings=odd).close()
    with pytest.raises(ValueError, match='x was nan and is 1.0 now'):
        checkpoints(tmp_path, settings={**odd, 'x': 1.0})


def test_names_of_other_settings_are_those_of_settings(tmp_path):
    settings = {'seed': 1, 'data': 'a'}
    checkpoints(tmp_path, settings=settings).close()
    with pytest.raises(TypeError, match=r"must be a tuple of names: received 'data_seed'"):
        checkpoints(tmp_path, settings={'seed': 2, 'data': 'b'}, other_settings='data_seed')
    with pytest.raises(ValueError, match=r"received 'sed'. There are \['data', 'seed'\]"):
        checkpoints(tmp_path, settings=settings, other_settings=('seed', 'sed'))
    # one that an earlier start had may be gone
    checkpoints(tmp_path, settings={'data': 'a'}, other_settings=('seed',)).close()


def test_a_forked_child_neither_keeps_nor_ends_the_lock(tmp_path):
    program = (
        'import os, pathlib, sys\n'
        'from peftjax._lock import Lock\n'
        'folder = pathlib.Path(sys.argv[1])\n'
        'lock, (ends, told) = Lock(folder), os.pipe()\n'
        'ready, begun = os.pipe()\n'
        'if not os.fork():\n'
        '    os.close(told)\n'
        '    if sys.argv[2] == "releases":\n'
        '        lock.release()\n'
        '    os.write(begun, b"x")\n'
        '    os.read(ends, 1)  # until the parent is gone\n'
        '    os._exit(0)\n'
        'os.read(ready, 1)\n'
        'try:\n'
        '    Lock(folder)\n'
        'except BlockingIOError:\n'
        '    print("held", flush=True)\n'
        'lock.release()\n'
        'Lock(folder).release()\n'
        'print("free", flush=True)\n'
    )
    for child in ('releases', 'stays'):
        command = [sys.executable, '-W', 'ignore', '-c', program, tmp_path, child]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.stdout == 'held\nfree\n', ended.stderr


def test_a_run_that_forgot_to_resume_is_refused(tmp_path):
    with checkpoints(tmp_path) as saved:
        saved.save(at(100))
        saved.save(at(200))
    with checkpoints(tmp_path) as saved:
        for step in (50, 300):
            with pytest.raises(ValueError, match=r'holds \[100, 200\], and none was taken'):
                saved.save(at(step))
        saved.restore(fresh())
        with pytest.raises(ValueError, match='from its step 200: received a state of step 50'):
            saved.save(at(50))
        assert saved.steps() == [100, 200]
        saved.save(at(300))
        assert saved.steps() == [200, 300]


def test_a_run_that_is_taken_back_leaves_the_later_steps(tmp_path, caplog):
    with checkpoints(tmp_path, keep=4) as saved:
        for step in (100, 150, 200):
            saved.save(at(step))
    with caplog.at_level(logging.WARNING, 'peftjax'), checkpoints(tmp_path, keep=4) as saved:
        saved.restore(fresh(), step=100)
        assert saved.steps() == [100, 150, 200], 'a look changes nothing'
        saved.save(at(180))
        assert saved.steps() == [100, 180]
    for step in (150, 200):
        assert f'step {step} is of a course that was left at step 100: removed' in caplog.text
    with checkpoints(tmp_path, keep=4) as saved:
        assert saved.restore(fresh()).step == 180


def test_a_damaged_step_that_was_passed_over_takes_no_place(folder):
    damage(folder / 'steps/5/_CHECKPOINT_METADATA', 'cut')
    with checkpoints(folder, keep=2) as saved:
        assert saved.restore(fresh(), fall_back=True).step == 4
        saved.save(at(6))
        assert saved.steps() == [4, 6]
        assert saved.restore(fresh(), step=4).step == 4


@pytest.mark.parametrize('fails', ['_store', '_seal'])
def test_a_step_that_cannot_be_stored_leaves_the_later_ones(tmp_path, monkeypatch, fails):
    """And the one of the same number."""

    def full(self, step, *args):
        if fails == '_seal':
            self._place(step).exists() or pytest.fail('it was stored')
        raise OSError(errno.ENOSPC, 'No space left on device')

    with checkpoints(tmp_path, keep=4) as saved:
        for step in (1, 2, 3):
            saved.save(at(step))
        saved.restore(fresh(), step=1)
        with monkeypatch.context() as patch:
            patch.setattr(_steps.Steps, fails, full)
            saved.save(at(2)._replace(skipped=jnp.int32(7)))
            with pytest.raises(OSError, match='Earlier steps are as they were'):
                saved.wait()
        assert sorted(path.name for path in (tmp_path / 'steps').iterdir()) == list('123')
        assert bits(saved.restore(fresh(), step=2).state) == bits(at(2))
        saved.save(at(2)._replace(skipped=jnp.int32(7)))
        assert saved.steps() == [1, 2] and saved.restore(fresh()).state.skipped == 7
    assert sorted(path.name for path in (tmp_path / 'steps').iterdir()) == list('12')


@pytest.mark.parametrize('sealed', [True, False])
def test_what_stood_aside_when_a_write_was_cut_off_returns(folder, sealed):
    """Killed before the new one was sealed, or before the old one was removed."""
    steps = folder / 'steps'
    subprocess.run(['cp', '-r', steps / '5', steps / '.5.old'], check=True)
    if not sealed:
        (steps / '5/manifest.json').unlink()
    with checkpoints(folder, keep=9) as saved:
        assert saved.steps() == [0, 1, 2, 3, 4, 5]
        assert saved.restore(fresh()).step == 5
    assert sorted(path.name for path in steps.iterdir()) == list('012345')


def test_between_the_steps_of_the_unbroken_run_one_stays_until_the_next(tmp_path):
    seen = []
    with checkpoints(tmp_path, keep=2) as saved:
        for step in (5, 10, 12, 13, 15, 20):
            saved.save(at(step), every=5, counts={'row': step})
            seen.append(saved.steps())
        assert seen == [[5], [5, 10], [5, 10, 12], [5, 10, 13], [10, 15], [15, 20]]
        assert saved.counts == {'row': 20}
        assert saved.earlier(fresh(), 15).step == 15 and saved.earlier(fresh(), 7) is None
        assert saved.counts == {'row': 20}
    with checkpoints(tmp_path) as saved:
        assert saved.counts == {}
        saved.restore(fresh(), step=15)
        assert saved.counts == {'row': 15}


def test_a_seal_comes_after_what_it_seals(tmp_path, monkeypatch):
    """On the disk, in the order in which it is told to keep them."""
    synced, sync = [], os.fsync
    name = lambda handle: os.readlink(f'/proc/self/fd/{handle}')
    monkeypatch.setattr(os, 'fsync', lambda handle: synced.append(name(handle)) or sync(handle))
    with checkpoints(tmp_path) as saved:
        assert [pathlib.Path(one).name for one in synced] == ['.run.json.part', tmp_path.name]
        synced.clear()
        saved.save(fresh())
        saved.wait()
    files = {str(path) for path in (tmp_path / 'steps/0').rglob('*') if path.is_file()}
    last = [str(tmp_path / 'steps/0/.manifest.json.part'), str(tmp_path / 'steps/0')]
    assert synced[-2:] == last
    assert files - {str(tmp_path / 'steps/0/manifest.json')} <= set(synced[:-2])
    assert str(tmp_path / 'steps') in synced[:-2]
