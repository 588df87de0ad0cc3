import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import peftjax as pj
from peftjax import checkpoint
from peftjax._fingerprint import Fingerprint
from peftjax._method import Method

LORA = pj.Lora(rank=2, alpha=3.0, target=('up', 'down'), ranks=(('up', 1),))
METHODS = {
    'lora': LORA,
    'dora': pj.Dora(rank=2, target='kernel'),
    'ia3': pj.Ia3(target='kernel'),
    'adapter': pj.Adapter(target='down', reduction=2.0),
    'bit_fit': pj.BitFit(),
    'trainable': pj.Trainable(target='embed'),
    'prompt': pj.PromptTuning(target='embed', length=3, fill=(('bias', float('-inf')),)),
    'chain': pj.chain(LORA, head=pj.chain(pj.BitFit(target='up'), pj.Trainable(target='embed'))),
}


def make(width=4):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    layer = {
        'up': {'kernel': draw(width, 6), 'bias': draw(6)},
        'down': {'kernel': draw(6, width), 'bias': draw(width)},
    }
    return {'embed': draw(9, width), 'layer_0': layer}


def apply(params, ids):
    x = jnp.take(params['embed'], ids, axis=0)
    up, down = params['layer_0']['up'], params['layer_0']['down']
    return x + jnp.tanh(x @ up['kernel'] + up['bias']) @ down['kernel'] + down['bias']


IDS = jnp.arange(6).reshape(2, 3)


def adapter(method=LORA):
    params = make()
    peft = pj.attach(method, apply, params, IDS)
    phi = jax.eval_shape(lambda: peft.init(jax.random.key(0), params))
    rng = np.random.default_rng(1)
    return params, peft, jax.tree.map(lambda a: rng.normal(size=a.shape).astype(a.dtype), phi)


def same_bits(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize('name', METHODS)
def test_what_is_loaded_equals_what_was_saved(name, tmp_path):
    params, peft, phi = adapter(METHODS[name])
    folder = checkpoint.save(tmp_path / 'x', peft, phi, params=params, metadata={'labels': ['a']})
    loaded = checkpoint.load(folder, params=params)
    assert loaded.peft == peft and hash(loaded.peft) == hash(peft)
    assert str(loaded.peft) == str(peft)
    assert loaded.metadata == {'labels': ['a']}
    assert loaded.fingerprint == Fingerprint.of(params)
    same_bits(loaded.phi, phi)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['x']


def test_forward_and_merge_after_load(tmp_path):
    params, peft, phi = adapter()
    checkpoint.save(tmp_path / 'x', peft, phi)
    loaded = checkpoint.load(tmp_path / 'x')
    want = jax.jit(peft.wrap(apply))(params, phi, IDS)
    same_bits(jax.jit(loaded.peft.wrap(apply))(params, loaded.phi, IDS), want)
    merged = apply(loaded.peft.merge(params, loaded.phi), IDS)
    np.testing.assert_allclose(merged, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float8_e4m3fn'])
def test_dtypes_are_kept(dtype, tmp_path):
    _, peft, phi = adapter()
    phi = jax.tree.map(lambda a: a.astype(dtype), phi)
    checkpoint.save(tmp_path / 'x', peft, phi)
    same_bits(checkpoint.load(tmp_path / 'x').phi, phi)


def test_another_order_of_bytes_is_read_back(tmp_path):
    """NumPy has arrays in it, from files of other machines; JAX has not."""
    _, peft, phi = adapter()
    foreign = jax.tree.map(lambda a: np.asarray(a).astype('>f4'), phi)
    checkpoint.save(tmp_path / 'x', peft, foreign)
    same_bits(checkpoint.load(tmp_path / 'x').phi, phi)


def test_what_orbax_does_not_store_is_no_failure_of_the_disk(tmp_path):
    _, peft, phi = adapter()
    phi = jax.tree.map(lambda a: a.astype('uint4'), phi)
    with pytest.raises(ValueError, match='phi must be what Orbax stores: .*uint4'):
        checkpoint.save(tmp_path / 'x', peft, phi)
    assert not list(tmp_path.iterdir())


def test_signed_zeros_and_tiny_values_are_kept(tmp_path):
    _, peft, phi = adapter()
    phi['layer_0/up/kernel']['a'] = jnp.asarray([[-0.0], [1e-45], [3e38], [1e-38]])
    checkpoint.save(tmp_path / 'x', peft, phi)
    same_bits(checkpoint.load(tmp_path / 'x').phi, phi)


def test_double_precision_is_refused_where_jax_would_round(tmp_path):
    _, peft, phi = adapter()
    checkpoint.save(tmp_path / 'x', peft, jax.tree.map(lambda a: np.asarray(a, np.float64), phi))
    with pytest.raises(ValueError, match="(?s)is float64.*update\\('jax_enable_x64', True\\)"):
        checkpoint.load(tmp_path / 'x')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Odd(Method):
    kinds = ('linear',)
    seam = 'weight'
    identity = 'exact'
    mergeable = True

    def init(self, key, sites, params):
        empty = {site.path: {} for site in sites}
        return {**empty, '%2F ü\n."': {'none': jnp.zeros((0, 3)), 'one': jnp.bfloat16(2)}}

    def expand(self, sites, phi):
        return {site.path: {} for site in sites}

    def bind(self, site, w, phi, key):
        return w if not hasattr(w, 'dense') else w.dense()


def odd():
    """A phi with empty dicts, empty arrays, scalars and strange names; a method of the user."""
    params = make()
    peft = dataclasses.replace(pj.attach(LORA, apply, params, IDS), method=Odd(target='up'))
    phi = peft.method.init(jax.random.key(0), peft.sites[0], params)
    found = [('%2F ü\n."/none', (0, 3), 'float32'), ('%2F ü\n."/one', (), 'bfloat16')]
    return dataclasses.replace(peft, phi=tuple(found)), phi


def test_a_method_of_the_user_and_a_strange_phi(tmp_path):
    peft, phi = odd()
    checkpoint.save(tmp_path / 'x', peft, phi)
    with pytest.raises(checkpoint.CheckpointError, match=r'adapter\.json.*methods=\(Class,\)'):
        checkpoint.load(tmp_path / 'x')
    loaded = checkpoint.load(tmp_path / 'x', methods=(Odd,))
    assert loaded.peft == peft
    same_bits(loaded.phi, phi)


def test_a_method_named_like_ours_is_refused(tmp_path):
    peft, phi = odd()
    lora = type('Lora', (Odd,), {})(target='up')
    with pytest.raises(ValueError, match='Lora is ours'):
        checkpoint.save(tmp_path / 'x', dataclasses.replace(peft, method=lora), phi)


def test_every_public_method_can_be_loaded():
    public = [v for v in vars(pj).values() if isinstance(v, type) and issubclass(v, Method)]
    public = [v for v in public if v is not Method]
    known = checkpoint._known(())
    assert len(public) >= 9
    assert [c for c in public if known.get(c.__name__) is not c] == []


FRESH = """
import sys, json, numpy as np
from peftjax.checkpoint import load
found = load(sys.argv[1])
a, b = (np.asarray(found.phi['layer_0/down/kernel'][k]) for k in 'ab')
print(json.dumps([found.peft.count(), float((a @ b).sum()), found.metadata]))
"""


def test_a_fresh_process_needs_no_model(tmp_path):
    _, peft, phi = adapter()
    checkpoint.save(tmp_path / 'x', peft, phi, metadata={'n': 1})
    command = [sys.executable, '-W', 'error', '-c', FRESH, str(tmp_path / 'x')]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    count, total, metadata = json.loads(out)
    pair = phi['layer_0/down/kernel']
    assert count == peft.count() and metadata == {'n': 1}
    assert abs(total - float((pair['a'] @ pair['b']).sum())) < 1e-5


def test_orbax_alone_reads_the_arrays(tmp_path):
    import orbax.checkpoint as ocp

    _, peft, phi = adapter()
    checkpoint.save(tmp_path / 'x', peft, phi)
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / 'x' / 'phi')
    want = {f'{path}/{name}': a for path, pair in phi.items() for name, a in pair.items()}
    same_bits(found, want)


@pytest.mark.parametrize('metadata', [{1: 'a'}, {'a': (1, 2)}, {'a': np.ones(2)}, {'a': {1}}, [1]])
def test_metadata_that_json_would_change_is_refused(metadata, tmp_path):
    _, peft, phi = adapter()
    with pytest.raises(ValueError, match='metadata must be what JSON keeps'):
        checkpoint.save(tmp_path / 'x', peft, phi, metadata=metadata)
    assert not list(tmp_path.iterdir())


def test_a_phi_on_several_devices_is_saved_whole(tmp_path):
    params, peft, phi = adapter()
    mesh = jax.make_mesh((2,), ('x',), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    spread = NamedSharding(mesh, PartitionSpec('x'))
    pair = phi['layer_0/down/kernel']
    phi['layer_0/down/kernel'] = {**pair, 'a': jax.device_put(pair['a'], spread)}
    checkpoint.save(tmp_path / 'x', peft, phi, params=params)
    same_bits(checkpoint.load(tmp_path / 'x').phi, phi)


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_the_fingerprint_does_not_depend_on_the_placement(kind):
    w = jax.random.normal(jax.random.key(0), (64, 128))
    want = Fingerprint.of({'w': w})
    mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(kind, kind))
    for spec in (PartitionSpec('x', 'y'), PartitionSpec('y')):
        placed = jax.device_put(w, NamedSharding(mesh, spec))
        assert Fingerprint.of({'w': placed}) == want
        with jax.set_mesh(mesh):
            assert Fingerprint.of({'w': placed}) == want
    assert Fingerprint.of({'w': np.asarray(w)}) == want


@pytest.mark.parametrize(
    'leaf', [jnp.float32(2), jnp.zeros((0, 3)), np.ones(3), jnp.ones(5, 'int4')]
)
def test_the_fingerprint_takes_any_leaf(leaf):
    assert not Fingerprint.of({'w': leaf}).differing({'w': leaf})


def test_the_fingerprint_allows_rounding_to_another_dtype_only():
    w = jax.random.normal(jax.random.key(0), (64, 128))
    mine = Fingerprint.of({'w': w})
    for dtype in ('bfloat16', 'float16'):
        assert not mine.differing({'w': w.astype(dtype)})
        assert not Fingerprint.of({'w': w.astype(dtype)}).differing({'w': w})
        assert mine.differing({'w': (1.05 * w).astype(dtype)}) == ['w']
    assert mine.differing({'w': jnp.nextafter(w, jnp.inf)}) == ['w']


def test_a_chain_keeps_the_order_of_its_methods(tmp_path):
    method = pj.chain(z=pj.Lora(rank=1, target='up'), a=pj.Lora(rank=2, target='up'))
    _, peft, phi = adapter(method)
    checkpoint.save(tmp_path / 'x', peft, phi)
    loaded = checkpoint.load(tmp_path / 'x')
    assert [name for name, _ in loaded.peft.method.methods] == ['z', 'a']
    assert loaded.peft == peft
