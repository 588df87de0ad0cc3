"""What a saved adapter must survive or refuse: damage, kills, wrong bases, names, full disks."""

import contextlib
import errno
import json
import multiprocessing
import os
import pathlib
import pickle
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax import _arrays, _disk, _folder, _manifest, checkpoint
from peftjax._names import check_name
from peftjax.checkpoint import CheckpointError


def make(width=4, layers=2, seed=0):
    rng = np.random.default_rng(seed)
    return {
        f'layer_{i:02}': {'kernel': np.float32(rng.normal(size=(width, width)))}
        for i in range(layers)
    }


def apply(params, x):
    for layer in params.values():
        x = jnp.tanh(x @ layer['kernel'])
    return x


def adapter(layers=2, **fields):
    params = make(layers=layers)
    method = pj.Lora(**{'rank': 2, 'target': 'kernel', **fields})
    peft = pj.attach(method, apply, params, jnp.ones((1, 4)))
    return params, peft


def filled(peft, value):
    phi = jax.eval_shape(lambda p: peft.init(jax.random.key(0), p), make(layers=len(peft.leaves)))
    return jax.tree.map(lambda a: np.full(a.shape, value, np.float32), phi)


@pytest.fixture(scope='module')
def origin(tmp_path_factory):
    params, peft = adapter()
    folder = tmp_path_factory.mktemp('origin') / 'x'
    return checkpoint.save(folder, peft, filled(peft, 1.0), params=params, metadata={'k': 'v'})


@pytest.fixture
def folder(origin, tmp_path):
    return shutil.copytree(origin, tmp_path / 'x')


def files(folder):
    return sorted(path for path in folder.rglob('*') if path.is_file())


def values(folder):
    """The one value that fills the phi of a folder."""
    phi = checkpoint.load(folder).phi
    found = {float(v) for a in jax.tree.leaves(phi) for v in np.unique(np.asarray(a))}
    assert len(found) == 1
    return found.pop()


def reseal(folder):
    (folder / 'manifest.json').unlink()
    _manifest.seal(folder, 'peftjax 9.9')


def rewrite(folder, **changes):
    """Changes adapter.json as another program would: with a manifest that fits."""
    file = folder / 'adapter.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    reseal(folder)


# R8: damage ---------------------------------------------------------------------------------------


def damages(data):
    yield b''
    yield data[: len(data) // 2]
    yield data[:-1]
    yield data + bytes(16)
    spread = {0, 1, len(data) // 3, len(data) // 2, 2 * len(data) // 3, len(data) - 1}
    for at in sorted(spread):
        for bit in (0, 3, 7):
            yield data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def test_every_damage_of_every_file_is_found_and_named(folder):
    count = 0
    assert len(files(folder)) >= 8
    for path in files(folder):
        data = path.read_bytes()
        for damaged in damages(data):
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError) as caught:
                checkpoint.load(folder)
            assert str(path) in str(caught.value)
            count += 1
        path.unlink()
        with pytest.raises(CheckpointError, match='missing') as caught:
            checkpoint.load(folder)
        assert str(path) in str(caught.value)
        path.write_bytes(data)
    assert count >= 8 * 20
    assert values(folder) == 1.0


def test_every_bit_of_the_manifest_counts(folder):
    path = folder / 'manifest.json'
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with pytest.raises(CheckpointError, match=r'manifest\.json'):
            _manifest.verify(folder)


@pytest.mark.parametrize('name', ['extra', 'phi/extra', 'phi/d/extra', 'sub/extra', '.hidden'])
def test_an_extra_file_is_found_and_named(name, folder):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text('')
    with pytest.raises(CheckpointError, match=f'{name}.* does not belong'):
        checkpoint.load(folder)


def test_several_damages_are_counted(folder):
    for i in range(15):
        (folder / f'extra{i:02}').write_text('')
    with pytest.raises(CheckpointError, match='extra09.* and 5 more'):
        checkpoint.load(folder)


def test_two_files_that_changed_places_are_found(folder):
    one, two = folder / 'phi' / '_METADATA', folder / 'phi' / 'manifest.ocdbt'
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(CheckpointError, match='_METADATA.*manifest.ocdbt'):
        checkpoint.load(folder)


@pytest.mark.parametrize('file', ['adapter.json', 'manifest.json'])
@pytest.mark.parametrize('sealed', [True, False])
def test_another_version_says_so(file, sealed, folder):
    path = folder / file
    text = path.read_text().replace('"format": 1', '"format": 99')
    path.write_text(text.replace('"writer": "peftjax 0.1.0"', '"writer": "peftjax 7.0"'))
    if sealed and file == 'adapter.json':
        reseal(folder)
    match = rf'{file}.* has format 99, written by .peftjax 7\.0.*reads format 1.*Use the version'
    with pytest.raises(CheckpointError, match=match):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    'text',
    [
        '',
        '[]',
        '1',
        '{"format": 1}',
        '[' * 100_000,
        '{"format": 1, "files": {"a": 1}}',
        '\xff',
        '{}',
    ],
)
@pytest.mark.parametrize('file', ['adapter.json', 'manifest.json'])
def test_nonsense_in_json_is_named(file, text, folder):
    (folder / file).write_bytes(text.encode('latin1'))
    if file == 'adapter.json':
        reseal(folder)
    with pytest.raises(CheckpointError, match=file):
        checkpoint.load(folder)


def edited(folder, *keys, value):
    found = json.loads((folder / 'adapter.json').read_text())
    home = found
    for key in keys[:-1]:
        home = home[key]
    home[keys[-1]] = value
    return found


FIELDS = ('peft', 'Peft', 'method', 'Lora')


@pytest.mark.parametrize(
    ('keys', 'value', 'message'),
    [
        ((*FIELDS, 'rank'), -1, 'rank'),
        ((*FIELDS, 'color'), 'red', 'unknown: color.*upgrade'),
        (('peft', 'Peft', 'method'), {'os.system': {'command': 'x'}}, 'known class.*os.system'),
        (('peft', 'Peft', 'method'), {'Peft': {'method': 1}}, 'missing: sites, leaves'),
        (('peft',), {'Site': {'path': 'a', 'kind': 'b', 'shape': [], 'dtype': ''}}, 'Peft is want'),
        (('peft',), None, 'Peft is wanted'),
        (('arrays',), {'a': [[2], 'float32']}, 'phi'),
        (('arrays',), 3, 'describe an adapter'),
        (('fingerprint',), {'Peft': {}}, 'known class'),
        (('metadata',), [], 'dict is wanted'),
    ],
)
def test_wrong_content_is_refused(keys, value, message, folder):
    rewrite(folder, **edited(folder, *keys, value=value))
    with pytest.raises(CheckpointError, match=f'(?s){message}') as caught:
        checkpoint.load(folder)
    assert str(folder) in str(caught.value)


def test_a_field_that_an_older_version_did_not_know_takes_its_default(folder):
    found = json.loads((folder / 'adapter.json').read_text())
    del found['peft']['Peft']['method']['Lora']['alphas']
    rewrite(folder, **found)
    assert checkpoint.load(folder).peft == adapter()[1]


# R9, R10: the wrong base, the wrong target --------------------------------------------------------


def test_the_right_base_is_taken(origin):
    checkpoint.load(origin, params=make())


@pytest.mark.parametrize(
    ('params', 'message'),
    [
        (make(width=5), r"2 arrays\).*'layer_00/kernel' has shape \(5, 5\), not \(4, 4\)"),
        (make(layers=1), "'layer_01/kernel' is missing"),
        (make(layers=3), "'layer_02/kernel' is unknown"),
        (make(layers=14), 'layer_11.* and 2 more'),
        ({'other': np.ones(3)}, "'layer_00/kernel' is missing.*'other' is unknown"),
    ],
)
def test_a_base_of_other_shapes_is_refused(params, message, origin):
    for allow in (False, True):
        with pytest.raises(ValueError, match=f'(?s){message}'):
            checkpoint.load(origin, params=params, allow_other_base=allow)


def test_a_base_of_other_values_is_refused_unless_allowed(origin):
    other = make()
    other['layer_01']['kernel'] = other['layer_01']['kernel'] * np.float32(1.0001)
    with pytest.raises(ValueError, match="1 of 2 leaves hold other values: 'layer_01/kernel'"):
        checkpoint.load(origin, params=other)
    checkpoint.load(origin, params=other, allow_other_base=True)
    loaded = checkpoint.load(origin)
    with pytest.raises(ValueError, match='allow_other_base=True'):
        loaded.check(other)


def test_many_other_leaves_are_counted(tmp_path):
    params, peft = adapter(layers=12)
    checkpoint.save(tmp_path / 'x', peft, filled(peft, 1), params=params)
    message = "12 of 12 leaves hold other values: .*'layer_09/kernel' and 2 more"
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path / 'x', params=make(layers=12, seed=1))


def test_without_a_fingerprint_the_base_is_called_unverified(tmp_path):
    params, peft = adapter()
    checkpoint.save(tmp_path / 'x', peft, filled(peft, 1))
    with pytest.warns(UserWarning, match='unverified'):
        checkpoint.load(tmp_path / 'x', params=params)
    with pytest.raises(ValueError, match='shape'):
        checkpoint.load(tmp_path / 'x', params=make(width=5))


def test_params_of_another_model_are_not_saved(tmp_path):
    _, peft = adapter()
    with pytest.raises(ValueError, match='params must be of the model'):
        checkpoint.save(tmp_path / 'x', peft, filled(peft, 1), params=make(width=5))
    shapes = jax.eval_shape(make)
    with pytest.raises(TypeError, match="values of params; 'layer_00/kernel'"):
        checkpoint.save(tmp_path / 'x', peft, filled(peft, 1), params=shapes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('target', 'message'),
    [
        ('kernal', "no site matches target='kernal'.*Nearest: 'layer_00/kernel'"),
        (('kernel', 'layer_07'), "no site matches target='layer_07'.*'layer_00/kernel'"),
    ],
)
def test_a_target_that_finds_nothing_is_refused(target, message):
    with pytest.raises(ValueError, match=message):
        adapter(target=target)


def test_a_target_that_cannot_be_adapted_is_refused():
    with pytest.raises(ValueError, match="finds only 'layer_00/kernel'"):
        pj.attach(pj.BitFit(target='kernel'), apply, make(), jnp.ones((1, 4)))


# R11: the arrays of phi ---------------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_arrays_are_not_saved(tmp_path):
    _, peft = adapter()
    good = filled(peft, 1)
    pair = good['layer_00/kernel']
    cases = {
        "'layer_00/kernel/b' is missing": {'a': pair['a']},
        "'layer_00/kernel/c' is unknown": {**pair, 'c': pair['a']},
        r"'layer_00/kernel/a' has shape \(4, 3\), not \(4, 2\)": {**pair, 'a': np.ones((4, 3))},
    }
    for message, wrong in cases.items():
        with pytest.raises(ValueError, match=message):
            checkpoint.save(tmp_path / 'x', peft, {**good, 'layer_00/kernel': wrong})
    with pytest.raises(TypeError, match='phi must be nested dicts of arrays'):
        checkpoint.save(tmp_path / 'x', peft, {k: tuple(v.values()) for k, v in good.items()})
    assert not list(tmp_path.iterdir())


def test_arrays_that_the_table_does_not_know_are_refused(folder):
    table = json.loads((folder / 'adapter.json').read_text())['arrays']
    pair = table['layer_00/kernel']
    cases = {
        'is unknown': {'a': pair['a']},
        "kernel/c' is missing": {**pair, 'c': pair['a']},
        r"a' has \(\(4, 2\), 'float32'\), not \(\(4, 3\)": {**pair, 'a': [[4, 3], 'float32']},
        r"'float32'\), not .*'bfloat16'": {**pair, 'a': [[4, 2], 'bfloat16']},
    }
    for message, wrong in cases.items():
        rewrite(folder, arrays={**table, 'layer_00/kernel': wrong})
        with pytest.raises(CheckpointError, match=message) as caught:
            checkpoint.load(folder)
        assert str(folder / 'phi') in str(caught.value)


def test_arrays_that_orbax_cannot_read_are_named(folder):
    (folder / 'phi' / '_METADATA').write_bytes(b'nonsense')
    reseal(folder)
    with pytest.raises(CheckpointError, match='must hold arrays as Orbax stores them') as caught:
        checkpoint.load(folder)
    assert str(folder / 'phi') in str(caught.value)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_what_is_not_finite_is_refused_unless_allowed(bad, dtype, tmp_path):
    _, peft = adapter()
    phi = jax.tree.map(lambda a: a.astype(jnp.dtype(dtype)), filled(peft, 1))
    phi['layer_01/kernel']['b'][1, 2] = bad
    with pytest.raises(ValueError, match=r"finite.*'layer_01/kernel/b' \(1 of 8 values\)"):
        checkpoint.save(tmp_path / 'x', peft, phi)
    assert not list(tmp_path.iterdir())
    checkpoint.save(tmp_path / 'x', peft, phi, allow_nonfinite=True)
    with pytest.raises(ValueError, match="finite.*'layer_01/kernel/b'"):
        checkpoint.load(tmp_path / 'x')
    found = np.asarray(
        checkpoint.load(tmp_path / 'x', allow_nonfinite=True).phi['layer_01/kernel']['b']
    )
    assert found.tobytes() == phi['layer_01/kernel']['b'].tobytes()


# R16: names ---------------------------------------------------------------------------------------

NAMES = [
    '',
    '.',
    '..',
    '../x',
    '/abs',
    'a/b',
    'a\\b',
    'C:x',
    'con',
    'CON',
    'nul.txt',
    'com1',
    'a\0',
] + ['a\n', '\n', 'x' * 300, 'а', 'lοra', 'x\u200b', 'x.', '.x', ' x', 'x ', '-x', '~', 'a:b', '*']


@pytest.mark.parametrize('name', NAMES)
def test_a_bad_name_is_refused_before_any_write(name, tmp_path):
    _, peft = adapter()
    inner = tmp_path / 'inner'
    with pytest.raises(ValueError, match='the name of an adapter'):
        checkpoint.save(inner, peft, filled(peft, 1), name=name)
    with pytest.raises(ValueError, match='the name of an adapter'):
        checkpoint.load(inner, name=name)
    assert not list(tmp_path.iterdir())


def test_good_names():
    for name in ('x', 'A-1', 'trec_r8.v2', '_', 'console', '7', 'x' * 100):
        assert check_name(name) == name
    with pytest.raises(TypeError, match='must be a string; got 3'):
        check_name(3)


@pytest.mark.parametrize('place', ['', '.', '..', '/', 'x/..', '../..', 'a\0b', 'gs://bucket/x'])
def test_a_place_without_a_name_is_refused(place):
    _, peft = adapter()
    with pytest.raises(ValueError, match='place (to save|of a saved adapter) must'):
        checkpoint.save(place, peft, filled(peft, 1))


def test_a_folder_is_loaded_from_within(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert values('.') == 1
    monkeypatch.chdir(folder.parent)
    assert values('x') == values('./x/') == values(str(folder)) == 1
    for place in ('a\0b', 'gs://bucket/x'):
        with pytest.raises(ValueError, match='must be a local path'):
            checkpoint.load(place)
    with pytest.raises(TypeError, match='must be a str or a path; got 3'):
        checkpoint.load(3)


def test_an_existing_name_is_kept_unless_overwritten(tmp_path):
    _, peft = adapter()
    checkpoint.save(tmp_path, peft, filled(peft, 1), name='x')
    with pytest.raises(FileExistsError, match='overwrite=True'):
        checkpoint.save(tmp_path, peft, filled(peft, 2), name='x')
    assert values(tmp_path / 'x') == 1
    checkpoint.save(tmp_path, peft, filled(peft, 2), name='x', overwrite=True)
    assert values(tmp_path / 'x') == 2
    assert os.listdir(tmp_path) == ['x']


def test_only_a_saved_adapter_is_ever_replaced(tmp_path):
    _, peft = adapter()
    (tmp_path / 'work').mkdir()
    (tmp_path / 'work' / 'thesis.tex').write_text('x')
    (tmp_path / 'phi').mkdir()
    (tmp_path / 'phi' / 'phi').mkdir()
    (tmp_path / 'file').write_text('x')
    (tmp_path / 'link').symlink_to(tmp_path / 'work')
    before = sorted(tmp_path.rglob('*'))
    for name in ('work', 'phi', 'file', 'link'):
        with pytest.raises(FileExistsError, match='only a'):
            checkpoint.save(tmp_path / name, peft, filled(peft, 1), overwrite=True)
    assert sorted(tmp_path.rglob('*')) == before


def test_a_damaged_adapter_can_be_replaced(folder):
    _, peft = adapter()
    (folder / 'adapter.json').unlink()
    checkpoint.save(folder, peft, filled(peft, 2), overwrite=True)
    assert values(folder) == 2


def test_links_are_not_followed_out(folder, tmp_path):
    outside = tmp_path / 'outside'
    shutil.move(folder / 'adapter.json', outside)
    (folder / 'adapter.json').symlink_to(outside)
    with pytest.raises(CheckpointError, match=r'adapter\.json.* is a link'):
        checkpoint.load(folder)
    (folder / 'adapter.json').unlink()
    shutil.move(outside, folder / 'adapter.json')
    shutil.move(folder / 'phi', outside)
    (folder / 'phi').symlink_to(outside)
    with pytest.raises(CheckpointError, match='phi.* is a link'):
        checkpoint.load(folder)


def test_a_name_that_is_a_link_is_not_followed(folder, tmp_path):
    (tmp_path / 'hub').mkdir()
    (tmp_path / 'hub' / 'y').symlink_to(folder)
    with pytest.raises(CheckpointError, match='is a link'):
        checkpoint.load(tmp_path / 'hub', name='y')
    assert values(tmp_path / 'hub' / 'y') == 1  # A path of the user's own may lead anywhere.


def test_a_leftover_that_is_a_link_is_removed_not_emptied(folder, tmp_path):
    _, peft = adapter()
    precious = tmp_path / 'precious'
    precious.mkdir()
    (precious / 'file').write_text('x')
    (tmp_path / '.x.saving').symlink_to(precious)
    (tmp_path / '.x.old').symlink_to(precious)
    checkpoint.save(folder, peft, filled(peft, 2), overwrite=True)
    assert values(folder) == 2 and (precious / 'file').exists()


def test_a_pipe_is_not_opened(folder):
    (folder / 'phi' / '_METADATA').unlink()
    os.mkfifo(folder / 'phi' / '_METADATA')
    with pytest.raises(CheckpointError, match='_METADATA.* is a device or pipe'):
        checkpoint.load(folder)


# R17: no pickle, no code --------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (os.environ['BOMB'],))


@pytest.mark.parametrize('name', ['adapter_model.bin', 'phi.pt', 'phi.npz', 'phi.pkl', 'x.ckpt'])
@pytest.mark.parametrize('where', ['alone', 'beside', 'sealed'])
def test_pickles_are_never_opened(name, where, folder, tmp_path, monkeypatch):
    monkeypatch.setenv('BOMB', str(tmp_path / 'boom'))
    if where == 'alone':
        shutil.rmtree(folder)
        folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    if where == 'sealed':
        reseal(folder)
    message = {'alone': 'never opened: convert it to safetensors', 'beside': 'does not belong'}
    with contextlib.ExitStack() as stack:
        if where != 'sealed':
            stack.enter_context(pytest.raises(CheckpointError, match=message[where]))
        checkpoint.load(folder)
    assert not (tmp_path / 'boom').exists()


def test_no_code_is_taken_from_the_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    for name in ('peftjax.py', 'Lora.py', '__init__.py', 'methods.py'):
        (folder / name).write_text(f'open({str(tmp_path / "boom")!r}, "w")')
    found = edited(folder, 'peft', 'Peft', 'method', value={'methods.Lora': {}})
    rewrite(folder, **found, auto_map={'Lora': 'methods.Lora'}, trust_remote_code=True)
    with pytest.raises(CheckpointError, match='known class'):
        checkpoint.load(folder)
    assert not (tmp_path / 'boom').exists()


def test_foreign_folders_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no saved folder'):
        checkpoint.load(tmp_path / 'none')
    (tmp_path / 'file').write_text('')
    with pytest.raises(NotADirectoryError, match='file'):
        checkpoint.load(tmp_path / 'file')
    (tmp_path / 'hf').mkdir()
    with pytest.raises(CheckpointError, match='Name a folder that peftjax.save wrote'):
        checkpoint.load(tmp_path / 'hf')
    (tmp_path / 'hf' / 'adapter_config.json').write_text('{}')
    with pytest.raises(CheckpointError, match=r'another library: pj\.hf\.load_adapter'):
        checkpoint.load(tmp_path / 'hf')


# R3: kills ----------------------------------------------------------------------------------------


def test_a_replacement_cut_short_leaves_the_old_or_the_new(origin, tmp_path):
    _, peft = adapter()
    new = checkpoint.save(tmp_path / 'new', peft, filled(peft, 2))
    states = {  # (in place, .x.old, .x.saving) -> the value that is read
        ('old', None, None): 1,
        ('old', None, 'half'): 1,
        ('old', None, 'new'): 1,
        (None, 'old', 'new'): 1,
        ('new', 'old', None): 2,
        ('new', 'half', None): 2,
        ('new', None, None): 2,
    }
    sources = {'old': origin, 'new': new}
    for i, (state, value) in enumerate(states.items()):
        home = tmp_path / str(i)
        home.mkdir()
        for name, content in zip(('x', '.x.old', '.x.saving'), state, strict=True):
            if content == 'half':
                (home / name / 'phi').mkdir(parents=True)
                (home / name / 'phi' / 'part').write_text('x')
            elif content:
                shutil.copytree(sources[content], home / name)
        assert values(home / 'x') == value
        with pytest.raises(FileExistsError):
            checkpoint.save(home / 'x', peft, filled(peft, 3))
        assert values(home / 'x') == value
        assert os.listdir(home) == ['x']
        checkpoint.save(home / 'x', peft, filled(peft, 3), overwrite=True)
        assert values(home / 'x') == 3
        assert os.listdir(home) == ['x']


def save_and_die(target, ready, step, count):
    """Saves 1 and 2 in turn; dies before the count-th call of a step beside the target."""
    _, peft = adapter()
    checkpoint.save(target, peft, filled(peft, 1))
    real, calls = getattr(os, step, None), []

    def counted(*args, **kwargs):
        if isinstance(args[0], int) or pathlib.Path(args[0]).parent == target.parent:
            calls.append(args)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    if step:
        setattr(os, step, counted)
    ready.set()
    for i in range(1000):
        checkpoint.save(target, peft, filled(peft, 2 - i % 2), overwrite=True)


BETWEEN = ['.x.old', '.x.saving']
KILLS = [('mkdir', 1, ['x']), ('fsync', 6, ['.x.saving', 'x']), ('rename', 1, ['.x.saving', 'x'])]
KILLS += [('rename', 2, BETWEEN), ('rename', 3, ['.x.saving', 'x']), *[('', 0, None)] * 5]


def test_kill_9_leaves_a_whole_folder(tmp_path):
    """Ten kills: five at chosen steps, five at any moment."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['orbax.checkpoint', 'peftjax.checkpoint'])
    rng = np.random.default_rng(0)
    _, peft = adapter()
    for i, (step, count, left) in enumerate(KILLS):
        target = tmp_path / str(i) / 'x'
        ready = context.Event()
        child = context.Process(target=save_and_die, args=(target, ready, step, count))
        child.start()
        assert ready.wait(60)
        if not step:
            time.sleep(rng.uniform(0, 0.3))
            child.kill()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        assert left is None or sorted(os.listdir(target.parent)) == left
        assert values(target) in (1, 2)
        checkpoint.save(target, peft, filled(peft, 3), overwrite=True)
        assert values(target) == 3
        assert os.listdir(target.parent) == ['x']


def test_two_writers_take_turns(tmp_path):
    import threading

    _, peft = adapter()
    failed = []

    def work(value):
        try:
            for _ in range(4):
                checkpoint.save(tmp_path / 'x', peft, filled(peft, value), overwrite=True)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(value,)) for value in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert values(tmp_path / 'x') in (1, 2)
    assert os.listdir(tmp_path) == ['x']


# R19: full and read-only disks --------------------------------------------------------------------


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, 'No space left on device', 'somewhere/file')


@pytest.mark.parametrize(
    ('module', 'name'),
    [(_manifest, 'seal'), (_arrays, 'write'), (_disk, 'sync_all'), (_folder, '_swap')],
)
@pytest.mark.parametrize('before', [True, False])
def test_a_full_disk_keeps_what_was_there(module, name, before, folder, monkeypatch):
    _, peft = adapter()
    if not before:
        shutil.rmtree(folder)
    monkeypatch.setattr(module, name, full)
    with pytest.raises(
        OSError, match=r'x. could not be saved \([\d,]+ bytes\).*somewhere'
    ) as caught:
        checkpoint.save(folder, peft, filled(peft, 2), overwrite=True)
    assert caught.value.errno == errno.ENOSPC and str(folder) in str(caught.value)
    assert os.listdir(folder.parent) == ['x'] * before
    assert not before or values(folder) == 1


@pytest.mark.parametrize('failing', [1, 2])
def test_a_failing_rename_keeps_what_was_there(failing, folder, monkeypatch):
    _, peft = adapter()
    rename, count = os.rename, []

    def fail(one, two):
        if 'orbax' not in str(one):
            count.append(one)
        return full() if len(count) == failing else rename(one, two)

    monkeypatch.setattr(os, 'rename', fail)
    with pytest.raises(OSError, match='could not be saved'):
        checkpoint.save(folder, peft, filled(peft, 2), overwrite=True)
    assert os.listdir(folder.parent) == ['x'] and values(folder) == 1


def test_too_little_space_is_known_before_writing(folder, monkeypatch):
    _, peft = adapter()
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(0, 0, 10))
    with pytest.raises(OSError, match='only 10 bytes are free'):
        checkpoint.save(folder, peft, filled(peft, 2), overwrite=True)
    assert os.listdir(folder.parent) == ['x'] and values(folder) == 1


def limited(target, ready, size):
    import resource

    _, peft = adapter(rank=4)
    checkpoint.save(target, peft, filled(peft, 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        checkpoint.save(target, peft, filled(peft, 2), overwrite=True)
    except OSError as error:
        (target.parent / 'message').write_bytes(str(error).encode()[:size])
        ready.set()


@pytest.mark.parametrize('size', [200, 1500])
def test_a_quota_keeps_what_was_there(size, tmp_path):
    """A limit of the system itself: in adapter.json, and in the arrays."""
    context = multiprocessing.get_context('forkserver')
    ready = context.Event()
    child = context.Process(target=limited, args=(tmp_path / 'x', ready, size))
    child.start()
    child.join(60)
    assert ready.is_set()
    assert 'could not be saved' in (tmp_path / 'message').read_text()
    assert sorted(os.listdir(tmp_path)) == ['message', 'x'] and values(tmp_path / 'x') == 1


def test_a_read_only_place_is_named(folder):
    _, peft = adapter()
    folder.parent.chmod(0o555)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        with pytest.raises(OSError, match='could not be saved') as caught:
            checkpoint.save(folder, peft, filled(peft, 2), overwrite=True)
    finally:
        if root:
            os.seteuid(0)
        folder.parent.chmod(0o755)
    assert caught.value.errno == errno.EACCES and str(folder) in str(caught.value)
    assert os.listdir(folder.parent) == ['x'] and values(folder) == 1


def test_an_interrupt_leaves_nothing(folder, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    _, peft = adapter()
    monkeypatch.setattr(_manifest, 'seal', interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(folder, peft, filled(peft, 2), overwrite=True)
    assert os.listdir(folder.parent) == ['x'] and values(folder) == 1
