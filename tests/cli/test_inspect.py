"""`inspect` on decoders, dense and quantized, and on their adapters: no weights are read."""

import jax
import language
import pytest
from commands import call

import peftjax as pj
from peftjax import models


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> str:
    return language.write_model(tmp_path_factory.mktemp('llama') / 'model')


def facts(out: str) -> dict[str, str]:
    """What stands below the table."""
    lines = [line.split('  ', 1) for line in out.splitlines() if '  ' in line]
    return {name.strip(): text.strip() for name, text in lines}


def test_a_decoder_shows_its_sites_and_sizes(peftjax, model):
    ran = peftjax('inspect', model)
    assert (ran.code, ran.err) == (0, '')
    assert 'model/layers/self_attn/q_proj/kernel' in ran.out and '@mlp_output' in ran.out
    params = models.load_decoder(model).params
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    told = facts(ran.out)
    assert told['family'] == 'llama, a decoder of 2 layers'
    assert (told['parameters'], told['dtype']) == (f'{count:,}', 'float32')
    assert told['bytes'] == f'{4 * count:,}, 4 a parameter' and 'quantized' not in told


def test_a_quantized_folder_says_so(peftjax, model, tmp_path):
    assert call('quantize', model, '--out', tmp_path / 'small', '--scheme', 'int4') == 0
    told = facts(peftjax('inspect', tmp_path / 'small').out)
    params = models.load_decoder(str(tmp_path / 'small')).params
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert told['bytes'].startswith(f'{held:,}, ')
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, pj.Quantized))
    small = [leaf for leaf in leaves if isinstance(leaf, pj.Quantized)]
    size, nbytes = sum(leaf.size for leaf in small), sum(leaf.nbytes for leaf in small)
    each = f'{nbytes / size:.3f} bytes a weight'
    assert told['quantized'] == f'int4: {size:,} weights in 7 leaves, {each}'


def test_shapes_of_a_folder_are_those_that_are_loaded(model, tmp_path):
    models.quantize_decoder(model, tmp_path / 'small', pj.NF4)
    for folder in (model, str(tmp_path / 'small')):
        shapes, loaded = models.abstract_decoder(folder).params, models.load_decoder(folder).params
        spec = lambda leaf: (leaf.shape, leaf.dtype)
        assert jax.tree.map(spec, shapes) == jax.tree.map(spec, loaded)


def test_an_adapter_of_a_decoder_tells_its_numbers_and_its_base(peftjax, model, tmp_path):
    lora, saved = (language.write_adapter(tmp_path / n, model, n) for n in ('lora', 'saved'))
    ran = peftjax('inspect', lora)
    told, loaded = facts(ran.out), pj.load(lora)
    arrays = jax.tree.leaves(loaded.phi)
    size = sum(a.size for a in arrays)
    assert told['phi'] == f'{size:,} numbers in 14 arrays, {4 * size:,} bytes'
    assert (told['rank'], told['alpha'], told['dropout']) == ('4', '6', '0.0')
    assert told['targets'].split(', ')[:3] == ['down_proj', 'gate_proj', 'up_proj']
    assert told['base'].startswith(f'{model}, ') and 'method: Lora(' in ran.out
    assert loaded.fingerprint is not None
    assert told['fingerprint'] == f'{loaded.fingerprint.digest}, of 12 leaves'
    told = facts(peftjax('inspect', saved).out)
    assert told['fingerprint'].startswith(loaded.fingerprint.digest)  # of one base
    assert told['ia3/targets'] == 'k_proj, v_proj' and told['saved/targets'] == 'lm_head'
