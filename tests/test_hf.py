"""Adapters of Hugging Face PEFT: what is refused, and what saving promises."""

import json
import random
import struct

import hf_case
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hf_case import CONFIG, TENSORS, X, attached, edit, edit_tensors, load, model, params
from safetensors.numpy import save_file

import peftjax as pj


@pytest.fixture
def folder(tmp_path):
    peft, phi = attached()
    return pj.hf.save_adapter(tmp_path, peft, phi, name='x', base_model='base')


def test_round_trip(folder):
    peft, phi = attached()
    loaded = load(folder)
    assert loaded.verified and loaded.base_model == 'base' and loaded.kind == 'LORA'
    assert not loaded.unused and not loaded.ignored and not loaded.notes
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), loaded.phi, phi))
    assert loaded.peft.phi == peft.phi
    with pytest.raises(ValueError, match='one by one'):
        pj.hf.save_adapter(folder / 'y', *attached(pj.Trainable(target='head')))


def test_other_names(tmp_path):
    """A model whose modules are called otherwise, scanned: `names` says what they are there."""
    theta = jax.tree.map(lambda *a: jnp.stack(a), *params()['h'].values())
    theta = {'blocks': {'first': theta['up'], 'second': theta['down']}, 'out': params()['head']}

    def scanned(p, x):
        def step(x, layer):
            first, second = layer['first'], layer['second']
            x = jnp.tanh(x @ first['kernel'] + first['bias'][None])
            return x @ second['kernel'] + second['bias'][None], None

        return jax.lax.scan(step, x, p['blocks'])[0] @ p['out']['kernel']

    def names(path):
        new = {'blocks/first': 'h.{}.up', 'blocks/second': 'h.{}.down', 'out': 'head'}
        module, _, leaf = path.rpartition('/')
        return f'{new[module]}.{"weight" if leaf == "kernel" else leaf}'

    peft, phi = attached()
    folder = pj.hf.save_adapter(tmp_path / 'x', peft, phi)
    loaded = pj.hf.load_adapter(folder, scanned, theta, X, names=names)
    out = loaded.peft.wrap(scanned)(theta, loaded.phi, X)
    np.testing.assert_allclose(out, peft.wrap(model)(params(), phi, X), rtol=1e-5)
    again = pj.hf.save_adapter(tmp_path / 'y', loaded.peft, loaded.phi, names=names)
    assert (again / TENSORS).read_bytes() == (folder / TENSORS).read_bytes()
    assert (again / CONFIG).read_text() == (folder / CONFIG).read_text()


CONFIGS = {
    'negative rank': ({'r': -1}, 'positive integer'),
    'no rank': ({'r': 0}, 'positive integer'),
    'huge rank': ({'r': 10**9}, 'rank must be at most'),
    'float rank': ({'r': 1e9}, 'positive integer'),
    'true rank': ({'r': True}, 'positive integer'),
    'other rank': ({'r': 3}, 'has shape'),
    'no alpha': ({'lora_alpha': 'much'}, 'finite number'),
    'bad flag': ({'use_rslora': 'yes'}, 'true or false'),
    'bad pattern': ({'target_modules': '('}, 'regular expressions'),
    'bad names': ({'target_modules': [1]}, 'list of strings'),
    'unknown type': ({'peft_type': 'NEW'}, 'must be one of LORA'),
    'unknown key': ({'new_key': 2}, 'unknown: new_key=2'),
    'code': ({'auto_map': {'x': 'evil.py'}}, 'unknown: auto_map'),
    'fewer targets': ({'target_modules': ['up']}, 'without a place: .*down'),
    'more targets': ({'target_modules': ['up', 'down', 'head']}, "missing: 'head'"),
    'layers': ({'layers_to_transform': [0], 'layers_pattern': 'h'}, 'without a place: .*h.1'),
    'nothing': ({'layers_to_transform': [7]}, 'must adapt something'),
    'biases': ({'bias': 'all'}, 'every bias.*h.0.up.bias'),
    'saved': ({'modules_to_save': ['head']}, 'every parameter.*head.weight'),
    'refused': ({'layer_replication': [[0, 1]]}, 'layer_replication.*cannot be represented'),
}


@pytest.mark.parametrize('name', CONFIGS)
def test_faults_of_the_configuration(folder, name):
    changes, message = CONFIGS[name]
    edit(folder, **changes)
    with pytest.raises(ValueError, match=f'(?s){message}'):
        load(folder)


def test_a_type_that_is_not_known_is_told_whatever_its_tensors_are(folder):
    edit(folder, peft_type='SHIRA')
    edit_tensors(folder, lambda tensors: tensors | {'shira_indices': np.zeros(2, np.int32)})
    with pytest.raises(ValueError, match="peft_type must be one of LORA, .*; got 'SHIRA'"):
        load(folder)


def test_names_that_nothing_has_are_listed(folder):
    names = {'target_modules': ['up', 'downn', 'down'], 'rank_pattern': {'upp': 3}}
    edit(folder, **names, alpha_pattern={'h.9.up': 5, 'up': 3})
    assert load(folder).unused == (
        "target_modules 'downn', which no module has",
        "rank_pattern 'upp', which no adapted module has",
        "alpha_pattern 'h.9.up', which no adapted module has",
    )


def test_unknown_things_are_listed_where_allowed(folder):
    edit(folder, new_key=2, idle_key=None, megatron_core='core')
    edit_tensors(folder, lambda t: t | {'base_model.model.stray': np.zeros(2, np.float32)})
    with pytest.warns(UserWarning, match='ignored new_key=2, base_model.model.stray'):
        loaded = load(folder, strict=False)
    assert loaded.ignored == ('new_key=2', 'base_model.model.stray')
    assert loaded.unused == ('megatron_core',) and not loaded.verified


FILES = {
    'truncated': b'{"peft_type": "LO',
    'not UTF-8': b'\xff\xfe{}',
    'a list': b'[]',
    'deep': b'[' * 10**6,
    'large': b' ' * (50 << 20),
    'empty': b'',
}


@pytest.mark.parametrize('name', FILES)
def test_broken_configuration(folder, name):
    (folder / CONFIG).write_bytes(FILES[name])
    (folder / 'manifest.json').unlink()
    with pytest.raises(pj.CheckpointError, match=CONFIG):
        load(folder)


def header(text, data=b'\0' * 8, length=None):
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack('<Q', len(text) if length is None else length) + text + data


def entry(start=0, end=8, shape=(2,), dtype='F32'):
    return {'dtype': dtype, 'shape': list(shape), 'data_offsets': [start, end]}


BROKEN = {
    'empty': b'',
    'long header': header({'a': entry()}, length=2**40),
    'no JSON': header(b'{{{'),
    'a list': header(b'[]'),
    'negative': header({'a': entry(-8, 0)}),
    'overlap': header({'a': entry(), 'b': entry(4, 12)}, b'\0' * 12),
    'dtype': header({'a': entry(dtype='X9')}),
    'eight bits': header({'a': entry(dtype='U8', shape=(8,))}),
    'overflow': header({'a': entry(shape=(2**62, 8))}),
    'twice': header(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)),
    'many': header({f't{i}': entry(shape=(0,), end=0) for i in range(100_001)}, b''),
}


@pytest.mark.parametrize('name', BROKEN)
def test_broken_tensors(folder, name):
    (folder / TENSORS).write_bytes(BROKEN[name])
    (folder / 'manifest.json').unlink()
    with pytest.raises(pj.CheckpointError, match=f'{TENSORS}|missing: .h.0.down'):
        load(folder)


@pytest.mark.parametrize('change', ['one less', 'half', 'more', 'flips'])
def test_damaged_tensors(folder, change):
    whole = (folder / TENSORS).read_bytes()
    size = int.from_bytes(whole[:8], 'little') + 8
    draw = random.Random(0)
    cut = {'one less': whole[:-1], 'half': whole[: len(whole) // 2], 'more': whole + b'\0' * 16}
    versions = [cut[change]] if change in cut else [
        whole[:i] + bytes([whole[i] ^ (1 << draw.randrange(8))]) + whole[i + 1 :]
        for i in (draw.randrange(size) for _ in range(150))
    ]  # fmt: skip
    for version in versions:
        (folder / TENSORS).write_bytes(version)
        with pytest.raises(pj.CheckpointError, match=TENSORS):  # by the manifest
            load(folder)
    (folder / 'manifest.json').unlink()
    for version in versions[:25]:
        (folder / TENSORS).write_bytes(version)
        try:  # a changed name, number or letter of the metadata; never a crash
            assert not load(folder).verified
        except ValueError:
            continue
        assert change == 'flips'


def test_tensors_that_do_not_fit(folder):
    name = 'base_model.model.h.0.up.lora_A.weight'
    edit_tensors(folder, lambda t: {n: a for n, a in t.items() if n != name})
    with pytest.raises(pj.CheckpointError, match='missing.*h.0.up'):
        load(folder)
    edit_tensors(folder, lambda t: t | {name: np.zeros((2, 5), np.float32)})
    with pytest.raises(pj.CheckpointError, match=r'h.0.up.lora_A.*\(2, 5\), not \(2, 4\)'):
        load(folder)
    edit_tensors(folder, lambda t: t | {name: np.full((2, 4), np.nan, np.float32)})
    with pytest.raises(ValueError, match='must be finite.*h.0.up.lora_A'):
        load(folder)
    assert np.isnan(load(folder, allow_nonfinite=True).phi['h/0/up/kernel']['a']).all()
    edit_tensors(folder, lambda t: t | {name: np.zeros((2, 4), np.float64)})
    with pytest.raises(pj.CheckpointError, match='float64'):
        load(folder)


def test_half_precision_is_kept_exactly(folder):
    halves = lambda t: {n: a.astype(ml_dtypes.bfloat16) for n, a in t.items()}
    edit_tensors(folder, halves)
    _, phi = attached()
    want = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), phi)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), load(folder).phi, want))


BASES = {
    'wider': ({'width': 5}, r'\(2, 4\), not'),
    'fewer layers': ({'layers': 1}, 'without a place'),
    'more layers': ({'layers': 3}, 'missing'),
}


@pytest.mark.parametrize('name', BASES)
def test_another_base_is_refused(folder, name):
    fields, message = BASES[name]
    theta = params(**fields)
    x = jnp.ones((2, fields.get('width', 4)), jnp.float32)
    with pytest.raises(ValueError, match=message):
        pj.hf.load_adapter(folder, model, theta, x)


def test_pickles_are_never_opened(folder):
    (folder / TENSORS).unlink()
    (folder / 'manifest.json').unlink()
    (folder / 'adapter_model.bin').write_bytes(b'\x80\x04')
    with pytest.raises(FileNotFoundError, match='never opened.*safe_serialization'):
        load(folder)


@pytest.mark.parametrize('name', ['', '..', '../x', '/abs', 'a/b', 'con', 'x\0', 'é', 'a' * 300])
def test_names_stay_in_the_folder(tmp_path, name):
    peft, phi = attached()
    with pytest.raises(ValueError, match='name of an adapter'):
        pj.hf.save_adapter(tmp_path, peft, phi, name=name)
    assert not list(tmp_path.iterdir())


def test_saving_is_whole_or_nothing(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    peft, phi = attached()
    with pytest.raises(FileExistsError):
        pj.hf.save_adapter(folder, peft, phi)

    def full(*_, **__):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('safetensors.numpy.save_file', full)
    with pytest.raises(OSError, match='as it was'):
        pj.hf.save_adapter(folder, peft, phi, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ['x']
    monkeypatch.setattr('safetensors.numpy.save_file', save_file)
    with pytest.raises(ValueError, match='must be finite'):
        pj.hf.save_adapter(folder, peft, jax.tree.map(lambda a: a * jnp.nan, phi), overwrite=True)
    pj.hf.save_adapter(folder, peft, jax.tree.map(lambda a: a + 1, phi), overwrite=True)
    assert load(folder).verified and list(folder.parent.iterdir()) == [folder]


UNSAVED = {
    'adapter': (pj.Adapter(target='up/kernel', reduction=2), "Adapter. Use format='adapterhub'"),
    'two': (pj.chain(pj.Lora(target='up/k', rank=2), pj.Ia3(target='down/k')), 'one by one'),
    'some biases': (pj.chain(hf_case.METHOD, pj.BitFit(target='0/up')), 'whole modules'),
    'leaves': (pj.BitFit(), 'one by one'),
}


@pytest.mark.parametrize('name', UNSAVED)
def test_what_peft_has_no_counterpart_of(tmp_path, name):
    method, message = UNSAVED[name]
    with pytest.raises(ValueError, match=message):
        pj.hf.save_adapter(tmp_path / 'x', *attached(method))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(('task', 'near'), [('SEQCLS', 'SEQ_CLS'), ('causal_lm', 'CAUSAL_LM')])
def test_tasks_that_peft_does_not_know(tmp_path, task, near):
    with pytest.raises(ValueError, match=f"(?s)one of .*; got '{task}'. Nearest: '{near}'"):
        pj.hf.save_adapter(tmp_path / 'x', *attached(), task_type=task)
    assert not list(tmp_path.iterdir())


def test_one_use_of_a_shared_weight_is_refused(tmp_path):
    """A tied head: PEFT would adapt the table alone, ours adapts both uses."""
    theta = {'embed_tokens': {'embedding': jnp.ones((5, 4), jnp.float32)}}
    tied = lambda p, ids: (w := p['embed_tokens']['embedding'])[ids] @ w.T
    untied = lambda p, ids: p['embed_tokens']['embedding'][ids]
    ids = jnp.zeros((2, 3), jnp.int32)
    peft = pj.attach(pj.Lora(target='embed', rank=2), untied, theta, ids)
    folder = pj.hf.save_adapter(tmp_path / 'x', peft, peft.init(jax.random.key(0), theta))
    with pytest.raises(ValueError, match='untie'):
        pj.hf.load_adapter(folder, tied, theta, ids)


def test_what_has_no_place_may_be_of_a_head_that_is_tied(tmp_path):
    theta = {'embed': {'embedding': jnp.ones((5, 4))}, 'up': {'kernel': jnp.eye(4)}}
    both = theta | {'lm_head': {'kernel': jnp.ones((4, 5))}}
    inner = lambda p, ids: p['embed']['embedding'][ids] @ p['up']['kernel']
    untied = lambda p, ids: inner(p, ids) @ p['lm_head']['kernel']
    tied = lambda p, ids: inner(p, ids) @ p['embed']['embedding'].T
    ids = jnp.zeros((2, 3), jnp.int32)
    peft = pj.attach(pj.Lora(target='kernel', rank=2), untied, both, ids)
    folder = pj.hf.save_adapter(tmp_path / 'x', peft, peft.init(jax.random.key(0), both))
    with pytest.raises(ValueError, match="lm_head.*a head that this one ties to 'embed/embedding'"):
        pj.hf.load_adapter(folder, tied, theta, ids)


SHARED = {
    'linear': (pj.Lora(target='up', rank=2), r"'up/kernel' \(linear\) has several uses"),
    'saved': (pj.chain(pj.Lora(target='embed'), pj.Trainable(target='up')), r"'up/kernel' \(lin"),
    'dora': (pj.Dora(target='embed', rank=2), 'different directions'),
}


@pytest.mark.parametrize('name', SHARED)
def test_what_peft_does_not_tie(tmp_path, name):
    """It ties a table and the head, and no more."""
    theta = {
        'embed': {'embedding': jnp.ones((9, 8), jnp.float32)},
        'up': {'kernel': jnp.ones((8, 8), jnp.float32)},
    }

    def tied(p, ids):
        w, up = p['embed']['embedding'], p['up']['kernel']
        return w[ids] @ up @ up.T @ w.T

    method, message = SHARED[name]
    peft = pj.attach(method, tied, theta, jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(ValueError, match=message):
        pj.hf.save_adapter(tmp_path / 'x', peft, peft.init(jax.random.key(0), theta))
    assert not list(tmp_path.iterdir())
