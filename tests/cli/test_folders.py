"""`merge`, `export`, `import` and `quantize`, on folders of a tiny Llama."""

import json
import pathlib
import shutil
import warnings

import jax
import jax.numpy as jnp
import language
import numpy as np
import pytest
import safetensors.numpy
from commands import call

import peftjax as pj
from peftjax import models


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> str:
    return language.write_model(tmp_path_factory.mktemp('llama') / 'model')


@pytest.fixture(scope='module')
def adapters(tmp_path_factory, model) -> dict[str, str]:
    folder = tmp_path_factory.mktemp('adapters')
    return {name: language.write_adapter(folder / name, model, name) for name in language.METHODS}


@pytest.fixture(scope='module')
def quantized(tmp_path_factory, model) -> str:
    out = tmp_path_factory.mktemp('quantized') / 'nf4'
    assert call('quantize', model, '--out', out) == 0
    return str(out)


def test_merged_is_a_model_that_computes_what_the_adapter_does(peftjax, adapters, model, tmp_path):
    ran = peftjax('merge', adapters['lora'], '--out', tmp_path / 'merged')
    assert ran.code == 0 and 'lora merged into' in ran.out
    assert (tmp_path / 'merged' / 'tokenizer.json').read_text() == '{}'
    merged = models.load_decoder(str(tmp_path / 'merged'))
    out = jax.jit(merged.model.apply_fn)(merged.params, language.IDS)
    wanted = language.adapted(adapters['lora'])
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-5)
    base = models.load_decoder(model)
    assert jnp.abs(base.model.apply_fn(base.params, language.IDS) - wanted).max() > 0.1


def test_merged_in_another_dtype(peftjax, adapters, tmp_path):
    out = tmp_path / 'merged'
    assert peftjax('merge', adapters['lora'], '--out', out, '--dtype', 'bfloat16').code == 0
    assert json.loads((out / 'config.json').read_text())['torch_dtype'] == 'bfloat16'
    assert models.decoder_config(str(out)).dtype == 'bfloat16'
    assert peftjax('merge', adapters['lora'], '--out', tmp_path / 'wide').code == 0
    small, wide = (models.load_decoder(str(f)).params for f in (out, tmp_path / 'wide'))
    rounded = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), wide)
    jax.tree.map(np.testing.assert_array_equal, small, rounded)


def test_weights_are_taken_as_they_lie_whatever_the_config_says(peftjax, adapters, model, tmp_path):
    """What says bfloat16 over weights of float32 would round them, and look like another base."""
    base = shutil.copytree(model, tmp_path / 'base')
    said = json.loads((base / 'config.json').read_text()) | {'torch_dtype': 'bfloat16'}
    (base / 'config.json').write_text(json.dumps(said))
    for source, out in ((model, 'merged'), (base, 'other')):
        ran = peftjax('merge', adapters['lora'], '--model', source, '--out', tmp_path / out)
        assert ran.code == 0 and 'float32' in ran.out
    ours, theirs = (models.load_decoder(str(tmp_path / f)).params for f in ('merged', 'other'))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert peftjax('export', adapters['lora'], '--out', tmp_path / 'peft').code == 0
    back = tmp_path / 'back'
    assert peftjax('import', tmp_path / 'peft', '--model', base, '--out', back).code == 0
    pj.load(back).check(models.load_decoder(model).params)


def test_what_does_not_merge_says_why_and_writes_nothing(peftjax, adapters, tmp_path):
    lora = pj.load(adapters['lora'])
    metadata = lora.metadata | {'task': 'classification'}
    classifier = pj.save(tmp_path / 'classifier', lora.peft, lora.phi, metadata=metadata)
    reasons = {
        adapters['prefix']: 'nothing to merge',
        adapters['adapter']: 'an adapter is not linear',
        classifier: 'classifies by the mean of the tokens',
    }
    for adapter, reason in reasons.items():
        ran = peftjax('merge', adapter, '--out', tmp_path / 'merged')
        assert (ran.code, ran.out) == (2, '') and reason in ran.err
    assert not (tmp_path / 'merged').exists()


@pytest.mark.slow
@pytest.mark.parametrize('name', ['lora', 'prefix', 'saved'])
def test_exported_and_imported_is_the_same_adapter(peftjax, adapters, model, tmp_path, name):
    there, back = tmp_path / 'peft', tmp_path / 'back'
    ran = peftjax('export', adapters[name], '--out', there)
    config = json.loads((there / 'adapter_config.json').read_text())
    assert ran.code == 0 and config['peft_type'] in ran.out
    assert config['base_model_name_or_path'] == model and config['task_type'] == 'CAUSAL_LM'
    ran = peftjax('import', there, '--model', model, '--out', back, '--max-tokens', 9)
    assert ran.code == 0 and f'over {model}' in ran.out
    about = pj.load(back).metadata
    assert about['task'] == 'language-model' and about['model'] == model
    assert (about['max_tokens'], about['method']) == (9, config['peft_type'].lower())
    ours, theirs = (language.adapted(str(folder)) for folder in (adapters[name], back))
    np.testing.assert_array_equal(ours, theirs)
    ours, theirs = (sorted(a.tobytes() for a in map(np.asarray, jax.tree.leaves(pj.load(f).phi)))
                    for f in (adapters[name], back))  # fmt: skip
    assert ours == theirs


@pytest.mark.slow
def test_an_adapter_whose_layers_differ(peftjax, model, tmp_path):
    """As PEFT has it with `rank_pattern` and `layers_to_transform`: what is a stack must not be."""
    base = models.load_decoder(model, scan_layers=False)
    uneven = pj.Lora(rank=4, alpha=6, target=r'0/.*q_proj|v_proj/k', ranks=(('1/.*v_proj', 2),))
    peft = pj.attach(uneven, base.model.apply_fn, base.params, language.IDS)
    phi = jax.tree.map(lambda a: jnp.full(a.shape, 0.1), peft.init(jax.random.key(0), base.params))
    pj.hf.save_adapter(tmp_path / 'peft', peft, phi, base_model=model)
    back, merged = tmp_path / 'back', tmp_path / 'merged'
    assert peftjax('import', tmp_path / 'peft', '--model', model, '--out', back).code == 0
    jax.tree.map(np.testing.assert_array_equal, pj.load(back).phi, phi)
    assert peftjax('merge', back, '--out', merged).code == 0
    merged = models.load_decoder(str(merged))
    out = jax.jit(merged.model.apply_fn)(merged.params, language.IDS)
    wanted = jax.jit(peft.wrap(base.model.apply_fn))(base.params, phi, language.IDS)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-5)
    assert peftjax('export', back, '--out', tmp_path / 'again').code == 0
    one, other = (
        safetensors.numpy.load_file(tmp_path / folder / 'adapter_model.safetensors')
        for folder in ('peft', 'again')
    )
    assert one.keys() == other.keys() and len(one) == 6
    jax.tree.map(np.testing.assert_array_equal, one, other)
    ran = peftjax('import', tmp_path / 'peft', '--model', tmp_path, '--out', tmp_path / 'no')
    assert ran.code == 2 and not (tmp_path / 'no').exists()


def test_virtual_tokens_of_adapterhub_leave_positions_as_they_are(peftjax, tmp_path):
    case = pathlib.Path(__file__).parents[3] / 'shared' / 'interop' / 'ah_prefix_gpt2'
    if not case.is_dir():
        pytest.skip(f'the stored case {case.name} is not beside the repository')
    out = tmp_path / 'out'
    assert peftjax('import', case, '--model', case / 'base', '--out', out).code == 0
    base, loaded = models.load_decoder(str(case / 'base')), pj.load(out)
    with np.load(case / 'io.npz') as io:
        ids, mask = (jnp.asarray(io[name], jnp.int32) for name in ('input_ids', 'attention_mask'))
        wanted = io['out_adapted']

    def hidden(params, *args, **kwargs):
        return base.model.apply({'params': params}, *args, method='hidden', **kwargs)

    places = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    how = {'attention_mask': mask, 'position_ids': places}
    found = loaded.peft.wrap(hidden)(base.params, loaded.phi, ids, **how)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_parity_export_is_read_by_peft(peftjax, adapters, model, tmp_path):
    torch = pytest.importorskip('torch', reason='parity needs PyTorch')
    peft = pytest.importorskip('peft', reason='parity needs PEFT')
    import transformers

    warnings.simplefilter('ignore')  # Theirs, about each other.
    assert peftjax('export', adapters['lora'], '--out', tmp_path / 'peft').code == 0
    assert peftjax('merge', adapters['lora'], '--out', tmp_path / 'merged').code == 0
    load = transformers.AutoModelForCausalLM.from_pretrained
    ids = torch.tensor(np.asarray(language.IDS), dtype=torch.long)
    over = peft.PeftModel.from_pretrained(load(model).eval(), tmp_path / 'peft').eval()
    wanted = language.adapted(adapters['lora'])
    for theirs in (over, load(tmp_path / 'merged').eval()):
        out = theirs(input_ids=ids).logits.detach().numpy()
        np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-5)


def test_a_quantized_folder_gives_the_quantized_leaves(peftjax, model, quantized):
    base, small = models.load_decoder(model), models.load_decoder(quantized)
    wanted = pj.quantize(base.params, pj.NF4, target=models.linears(base.config))
    assert jax.tree.structure(small.params) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, small.params, wanted)
    layers = models.load_decoder(quantized, scan_layers=False, dtype=jnp.bfloat16)
    down = layers.params['model']['layers']['1']['mlp']['down_proj']['kernel']
    assert isinstance(down, pj.Quantized) and down.dtype == jnp.bfloat16
    whole = wanted['model']['layers']['mlp']['down_proj']['kernel']
    np.testing.assert_array_equal(down.codes, whole.codes[1])


def test_a_quantized_folder_lies_as_it_is_told(quantized):
    mesh = jax.make_mesh((2,), ('model',), axis_types=(jax.sharding.AxisType.Auto,))
    where = models.decoder_sharding(language.CONFIG, mesh)
    params = models.load_decoder(quantized, sharding=where).params
    down = params['model']['layers']['mlp']['down_proj']['kernel']
    assert down.codes.sharding.shard_shape(down.codes.shape) == (2, 24, 16)
    jax.tree.map(np.testing.assert_array_equal, params, models.load_decoder(quantized).params)


def test_quantize_says_bytes_and_errors(peftjax, model, tmp_path):
    out, some = tmp_path / 'int8', ('--scheme', 'int8', '--target', 'o_proj/kernel|lm_head')
    ran = peftjax('quantize', model, '--out', out, *some)
    *lines, total, table = ran.out.splitlines()
    assert [line.split()[0] for line in lines] == [
        'lm_head/kernel', 'model/layers/self_attn/o_proj/kernel']  # fmt: skip
    assert all(0 < float(line.split()[1]) < 1 for line in lines)
    params = models.load_decoder(str(out)).params
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    dense = sum(leaf.nbytes for leaf in jax.tree.leaves(models.load_decoder(model).params))
    assert f'{dense:,} bytes before, {held:,} after' in total
    assert (out / 'tokenizer.json').exists()
    size = params['model']['embed_tokens']['embedding'].nbytes
    assert table.startswith(f'model/embed_tokens/embedding as they were, {size:,} bytes of these')
    ran = peftjax('quantize', model, '--out', tmp_path / 'all', '--embeddings')
    params = models.load_decoder(str(tmp_path / 'all')).params
    assert isinstance(params['model']['embed_tokens']['embedding'], pj.Quantized)
    assert isinstance(params['lm_head']['kernel'], pj.Quantized) and 'as they were' not in ran.out


def test_damage_to_a_quantized_folder_is_named(quantized, tmp_path):
    folder = shutil.copytree(quantized, tmp_path / 'damaged')
    file = folder / 'quantized-00001.safetensors'
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(pj.CheckpointError, match=r'quantized-00001.*was changed'):
        models.load_decoder(str(folder))


@pytest.mark.slow
def test_an_adapter_over_a_quantized_model_merges_when_asked(
    peftjax, adapters, quantized, tmp_path
):
    assert peftjax('export', adapters['lora'], '--out', tmp_path / 'peft').code == 0
    over = tmp_path / 'over'
    assert peftjax('import', tmp_path / 'peft', '--model', quantized, '--out', over).code == 0
    ran = peftjax('merge', over, '--out', tmp_path / 'merged')
    assert ran.code == 2 and '--dequantize' in ran.err
    assert peftjax('merge', over, '--out', tmp_path / 'merged', '--dequantize').code == 0
    merged = models.load_decoder(str(tmp_path / 'merged'))
    out = jax.jit(merged.model.apply_fn)(merged.params, language.IDS)
    np.testing.assert_allclose(out, language.adapted(str(over)), rtol=0, atol=1e-5)


def test_an_adapter_trained_over_weights_that_were_quantized_while_loading(
    peftjax, model, adapters, tmp_path
):
    base, lora = models.load_decoder(model), pj.load(adapters['lora'])
    small = pj.quantize(base.params, pj.NF4, target=models.linears(base.config))
    metadata = lora.metadata | {'settings': {'quantize': 'nf4', 'dtype': 'float32'}}
    over = pj.save(tmp_path / 'over', lora.peft, lora.phi, params=small, metadata=metadata)
    ran = peftjax('merge', over, '--out', tmp_path / 'no')
    assert ran.code == 2 and '--dequantize' in ran.err and not (tmp_path / 'no').exists()
    wanted = {'--dequantize': pj.dequantize(small), '--any-base': base.params}
    for option, params in wanted.items():
        out = tmp_path / option.strip('-')
        assert peftjax('merge', over, '--out', out, option).code == 0
        merged = models.load_decoder(str(out)).params
        equal = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
        jax.tree.map(equal, merged, lora.peft.merge(params, lora.phi))


def test_wrong_folders_are_told_apart(peftjax, adapters, model, tmp_path):
    new = ('--out', tmp_path / 'new')
    peft = tmp_path / 'peft'
    assert peftjax('export', adapters['lora'], '--out', peft).code == 0
    cases = {
        ('merge', model, *new): 'This one is a model',
        ('merge', tmp_path / 'none', *new): 'no such adapter folder',
        ('merge', peft, *new): 'peftjax import makes an adapter of it',
        ('merge', adapters['lora'], *new, '--model', tmp_path / 'none'): 'say so with --model',
        ('export', tmp_path, *new): 'This one is something else',
        ('export', adapters['adapter'], *new): 'counterpart of Adapter. Use --format adapterhub',
        ('export', adapters['lora'], '--out', peft): 'or --overwrite',
        ('import', tmp_path / 'none', '--model', model, *new): 'no such folder',
        ('import', model, '--model', model, *new): 'must hold adapter_config.json',
        ('import', peft, '--model', tmp_path / 'none', *new): 'no such model folder',
        ('quantize', adapters['lora'], *new): 'Name that model',
        ('quantize', model, *new, '--target', 'nothing'): 'no leaf matches',
        ('quantize', model, '--out', peft): 'Choose another --out',
        ('quantize', model, *new, '--scheme', 'nf3'): 'invalid choice',
    }
    for arguments, reason in cases.items():
        ran = peftjax(*arguments)
        assert (ran.code, ran.out) == (2, '') and reason in ran.err, (arguments, ran)
    assert not (tmp_path / 'new').exists()
    assert peftjax('export', adapters['lora'], '--out', peft, '--overwrite').code == 0
