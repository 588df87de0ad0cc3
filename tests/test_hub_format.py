"""AdapterHub's format: what it cannot hold, and what stored cases do not show."""

import contextlib
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_round_trip import attached, equal

import peftjax as pj
from peftjax.models import Compute, Decoder, Encoder, EncoderConfig, read_decoder_config

IDS = jax.ShapeDtypeStruct((2, 5), jnp.int32)
PLACES = jax.ShapeDtypeStruct((2, 5), jnp.int32)


@functools.cache
def bert(scan_layers=True):
    """A tiny encoder with a head over its first token; of its parameters the shapes."""
    config = EncoderConfig(
        model_type='bert',
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
    )
    model = Encoder(config, Compute(scan_layers=scan_layers))
    body = jax.eval_shape(model.init, jax.random.key(0), IDS)['params']
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    params = {'bert': body, 'heads': {'1': {'kernel': shape(8, 2), 'bias': shape(2)}}}

    def apply_fn(params, ids, position_ids):
        hidden = model.apply_fn(params['bert'], ids, position_ids=position_ids)
        head = params['heads']['1']
        return hidden[:, 0] @ head['kernel'] + head['bias'][None]

    return apply_fn, params


def adapter(method, scan_layers=True):
    apply_fn, params = bert(scan_layers)
    return attached(method, apply_fn, params, IDS, position_ids=PLACES)


def save(folder, peft, phi, **options):
    options = {'model_type': 'bert'} | options
    return pj.hf.save_adapter(folder / 'mine', peft, phi, format='adapterhub', **options)


def load(folder, scan_layers=True):
    apply_fn, params = bert(scan_layers)
    return pj.hf.load_adapter(folder, apply_fn, params, IDS, position_ids=PLACES)


def inner(folder):
    return json.loads((folder / 'adapter_config.json').read_text())['config']


HOULSBY = dataclasses.replace(pj.HOULSBY, reduction=2)
NORMED = pj.Adapter(target='@attention_output', reduction=2, norm='before', initial='houlsby')
UNIONS = {
    'norms': pj.chain(adapter_attention=NORMED, adapter_mlp=pj.Adapter(target='@mlp_output')),
    'sources': pj.chain(
        adapter_attention=pj.Adapter(target='@attention_output', source='@attention_residual'),
        adapter_mlp=pj.PARALLEL,
    ),
    'ia3': pj.chain(
        prefix_tuning=pj.PrefixTuning(length=2, side='back'), ia3=pj.Ia3(target='(key|value)/k')
    ),
    'lora': pj.chain(
        lora=pj.Lora(target='intermediate/dense/kernel', rank=2, alpha=3, dropout=0.1),
        prompt_tuning=pj.PromptTuning(target='@embeddings', initial='random', side='back'),
    ),
}


@pytest.mark.parametrize('name', UNIONS)
def test_unions(name, tmp_path):
    """Methods of different kinds, or adapters that differ in more than their place."""
    peft, phi = adapter(UNIONS[name])
    folder = save(tmp_path, peft, phi)
    assert inner(folder)['architecture'] == 'union' and len(inner(folder)['configs']) == 2
    loaded = load(folder)
    assert loaded.kind == 'adapterhub/union' and not loaded.notes and not loaded.ignored
    assert equal(loaded.phi, phi)
    again = save(tmp_path / 'again', loaded.peft, loaded.phi)
    for file in ('adapter_config.json', 'adapter.safetensors'):
        assert (again / file).read_bytes() == (folder / file).read_bytes()


def test_adapters_alike_at_two_places_are_one(tmp_path):
    peft, phi = adapter(HOULSBY)
    folder = save(tmp_path, peft, phi, base_model='base')
    assert inner(folder)['mh_adapter'] and inner(folder)['output_adapter']
    loaded = load(folder)
    assert loaded.base_model == 'base' and loaded.verified
    parts = {path: arrays for part in loaded.phi.values() for path, arrays in part.items()}
    assert equal(parts, phi)
    assert [part.initial for _, part in loaded.peft.method.parts] == ['bert', 'bert']


def test_layers_left_out_and_widths(tmp_path):
    method = pj.Adapter(
        target='@mlp_output/[02]', source='@mlp_residual', reductions=(('@mlp_output/0', 2),)
    )
    peft, phi = adapter(method, scan_layers=False)
    folder = save(tmp_path, peft, phi)
    assert inner(folder)['leave_out'] == [1]
    assert inner(folder)['reduction_factor'] == {'0': 2, 'default': 16}
    assert equal(load(folder, scan_layers=False).phi, phi)
    assert 'bert.' not in ''.join(load_file(folder / 'adapter.safetensors'))  # There is no head.
    lora = pj.Lora(target='layer/1/.*query/kernel', rank=2)
    peft, phi = adapter(lora, scan_layers=False)
    folder = save(tmp_path / 'lora', peft, phi)
    assert inner(folder)['leave_out'] == [0, 2]
    assert equal(load(folder, scan_layers=False).phi, phi)


def test_a_head(tmp_path):
    method = pj.chain(lora=pj.Lora(target='query/k', rank=2), saved=pj.Trainable(target='heads/1'))
    peft, phi = adapter(method)
    said = {'head_type': 'classification', 'layers': 1, 'num_labels': 2, 'use_pooler': False}
    folder = save(tmp_path, peft, phi, head=said)
    about = json.loads((folder / 'head_config.json').read_text())
    assert about['config'] == said and about['model_class'] == 'BertAdapterModel'
    names = [*load_file(folder / 'adapter.safetensors')]
    assert all(name.startswith('bert.encoder.layer.') for name in names)
    head = load_file(folder / 'model_head.safetensors')
    assert {n: t.shape for n, t in head.items()} == {
        'heads.mine.1.weight': (2, 8),
        'heads.mine.1.bias': (2,),
    }
    loaded = load(folder)
    assert loaded.head == said and equal(loaded.phi, phi)


def test_replaces_a_folder_of_either_format(tmp_path):
    peft, phi = adapter(pj.Lora(target='query/k', rank=2))
    first = pj.hf.save_adapter(tmp_path / 'mine', peft, phi)
    with pytest.raises(FileExistsError):
        save(tmp_path, peft, phi)
    folder = save(tmp_path, peft, phi, overwrite=True)
    assert folder == first and not (folder / 'adapter_model.safetensors').exists()
    assert load(folder).kind == 'adapterhub/lora'
    pj.hf.save_adapter(folder, peft, phi, overwrite=True)
    assert load(folder).kind == 'LORA'


def test_a_network_that_reads_wider_tokens_than_keys(tmp_path):
    """With grouped queries; its prefix is read, and written when ours is of another width."""
    fields = {'vocab_size': 9, 'hidden_size': 8, 'num_hidden_layers': 2, 'intermediate_size': 6}
    heads = {'num_attention_heads': 4, 'num_key_value_heads': 2}
    model = Decoder(read_decoder_config({'model_type': 'llama', **fields, **heads}))
    params = jax.eval_shape(model.init, jax.random.key(0), IDS)['params']
    method = pj.PrefixTuning(length=3, projection=5, shift=False)
    peft, phi = attached(method, model.apply_fn, params, IDS, position_ids=PLACES)
    with pytest.warns(UserWarning, match='without the network'):
        folder = save(tmp_path, peft, phi, model_type='llama')
    loaded = pj.hf.load_adapter(folder, model.apply_fn, params, IDS, position_ids=PLACES)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), loaded.phi,
                 peft.fold(phi)[1])  # fmt: skip

    draw, ends = np.random.default_rng(0), ('control_trans.0', 'control_trans.2')
    shapes = {'wte.weight': (3, 8)}
    for end, (out, inner) in zip(ends, ((5, 8), (2 * 2 * 4, 5)), strict=True):
        shapes |= {f'{end}.weight': (out, inner), f'{end}.bias': (out,)}
    made = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    start = 'prefix_tuning.prefix_tunings.mine.self_prefix'
    (folder / 'manifest.json').unlink()
    save_file({f'{start}.{n}': t for n, t in made.items()}, folder / 'adapter.safetensors')
    about = json.loads((folder / 'adapter_config.json').read_text())
    about['config'] |= {'flat': False, 'bottleneck_size': 5}
    (folder / 'adapter_config.json').write_text(json.dumps(about))
    with pytest.warns(UserWarning, match='what it makes is loaded'):
        loaded = pj.hf.load_adapter(folder, model.apply_fn, params, IDS, position_ids=PLACES)
    hidden = np.tanh(made['wte.weight'] @ made['control_trans.0.weight'].T
                     + made['control_trans.0.bias'])  # fmt: skip
    rows = hidden @ made['control_trans.2.weight'].T + made['control_trans.2.bias']
    rows = rows.reshape(3, 2, 2, 2, 2).transpose(2, 1, 0, 3, 4)  # of keys, of values
    for name, wanted in zip(('@key', '@value'), rows, strict=True):
        np.testing.assert_allclose(loaded.phi[name]['prefix'], wanted, rtol=1e-5, atol=1e-6)


VERSIONS = {
    'adapters.0.1.0': 2,
    'adapters.1.0.1': 2,
    'adapters.1.1.0.dev0': 2,
    'adapters.1.1.0': 3,
    'adapters.1.10.0': 3,
    '3.2.1': 3,
    None: 3,
}


@pytest.mark.parametrize('version', VERSIONS)
@pytest.mark.parametrize('method', [pj.Lora(target='query/k', rank=2, alpha=3), UNIONS['lora']])
def test_versions_that_trained_without_the_scale(version, method, tmp_path):
    folder = save(tmp_path, *adapter(method))
    (folder / 'manifest.json').unlink()
    said = json.loads((folder / 'adapter_config.json').read_text())
    (folder / 'adapter_config.json').write_text(json.dumps(said | {'version': version}))
    alpha = VERSIONS[version]
    known = f'^.*{version} trained without the scale .* alpha=2 in place of 3$'
    with pytest.warns(UserWarning, match=known) if alpha == 2 else contextlib.nullcontext():
        loaded = load(folder)
    [lora] = [part for _, part in loaded.peft.method.parts if isinstance(part, pj.Lora)]
    assert (lora.alpha, len(loaded.notes)) == (alpha, int(alpha == 2))


def test_query_key_and_value_in_one_layer(tmp_path):
    """One pair for all three becomes one for each, with the same ranks."""
    sizes = {'vocab_size': 9, 'n_embd': 8, 'n_layer': 2, 'n_head': 2, 'n_positions': 16}
    model = Decoder(read_decoder_config({'model_type': 'gpt2', **sizes}))
    params = jax.eval_shape(model.init, jax.random.key(0), IDS)['params']
    place = 'transformer/h/attn/c_attn/kernel'
    wide = attached(pj.Lora(target='c_attn/k', rank=3), model.apply_fn, params, IDS)
    folder = save(tmp_path, *wide, model_type='gpt2')
    assert inner(folder)['attn_matrices'] == ['q', 'k', 'v'] and inner(folder)['r'] == 3
    loaded = pj.hf.load_adapter(folder, model.apply_fn, params, IDS)
    assert equal(loaded.phi, wide[1])
    scale = attached(pj.Ia3(target='c_attn/k'), model.apply_fn, params, IDS)
    scale[1][place]['l'][:, 8:16] = 1
    folder = save(tmp_path / 'ia3', *scale, model_type='gpt2')
    assert inner(folder)['attn_matrices'] == ['q', 'v']
    assert equal(pj.hf.load_adapter(folder, model.apply_fn, params, IDS).phi, scale[1])


def test_a_scale_that_is_multiplied_once_more_is_refused(tmp_path):
    folder = save(tmp_path, *adapter(pj.Ia3(target='(key|value)/k')))
    (folder / 'manifest.json').unlink()
    said = json.loads((folder / 'adapter_config.json').read_text())
    assert inner(folder)['composition_mode'] == 'scale'
    said['config']['alpha'] = 2
    (folder / 'adapter_config.json').write_text(json.dumps(said))
    with pytest.raises(ValueError, match="alpha=2 cannot be .* composition_mode='scale'"):
        load(folder)


def test_dora_of_a_scale_of_one_needs_no_base(tmp_path):
    """Without a bias too, the formulas are the same."""
    theta = {'layers': {'0': {'self_attn': {'q_proj': {'kernel': jnp.ones((4, 4))}}}}}
    kernel = lambda p: p['layers']['0']['self_attn']['q_proj']['kernel']
    peft = pj.attach(
        pj.Dora(target='q_proj', rank=2), lambda p, x: x @ kernel(p), theta, jnp.ones((2, 4))
    )
    phi = peft.init(jax.random.key(0), theta)
    folder = save(tmp_path, peft, phi, model_type='llama')
    tensors = load_file(folder / 'adapter.safetensors')
    own = phi['layers/0/self_attn/q_proj/kernel']['m']
    np.testing.assert_array_equal(
        tensors['layers.0.self_attn.q_proj.loras.mine.m.weight'][:, 0], own
    )


QUERY = pj.Lora(target='query/kernel', rank=2)
PROMPT = pj.PromptTuning(target='@embeddings', initial='random', length=2)
REFUSED = {
    'no kind of model': (QUERY, {'model_type': None}, 'model_type, as in .* bert, roberta.*None'),
    'another kind': (QUERY, {'model_type': 'qwen3'}, "one of bert, .*got 'qwen3'"),
    'a task': (QUERY, {'task_type': 'SEQ_CLS'}, "format='adapterhub' has no use for task_type"),
    'another method': (
        pj.TrainableTokens(target='word_embeddings', ids=(1,)),
        {},
        'no counterpart of TrainableTokens',
    ),
    'another place': (pj.Adapter(target='query/kernel'), {}, "'bert/.*query/kernel' is elsewhere"),
    'another source': (
        pj.Adapter(target='@attention_output', source='@mlp_output'),
        {},
        "@attention_output reads its target or @attention_residual; .*'@mlp_output'",
    ),
    'a norm beside': (dataclasses.replace(pj.PARALLEL, norm='after'), {}, 'no norm over its sum'),
    'a stack': (pj.chain(HOULSBY, pj.PARALLEL), {}, 'at a place one.*one by one'),
    'two pairs': (pj.chain(QUERY, pj.Lora(target='key/k', rank=2)), {}, 'one by one'),
    'a base': (
        pj.chain(QUERY, pj.BitFit()),
        {},
        r"no parameters of the base in full; \['bert.*bias'",
    ),
    'a head alone': (
        pj.Trainable(target='heads'),
        {'head': {'head_type': 'classification'}},
        'trains a head alone',
    ),
    'a head unsaid': (pj.chain(QUERY, pj.Trainable(target='heads')), {}, 'heads.mine.1.*pass head'),
    'a head untrained': (QUERY, {'head': {'layers': 1}}, 'none is trained'),
    'another layer': (
        pj.Lora(target='attention/output/dense/kernel', rank=2),
        {},
        "attention.self.query, .*output.dense in a layer of Bert; 'bert/.*attention/output/dense",
    ),
    'no layer': (pj.Lora(target='word_embeddings', rank=2), {}, "word_embeddings' is not. Leave"),
    'two ranks': (
        pj.Lora(target='(query|key)/kernel', rank=2, ranks=(('key', 3),)),
        {},
        r'one rank and one alpha .* \[\(2, 1.0\), \(3, 1.0\)\]',
    ),
    'inputs': (
        pj.Ia3(target='(key|output/dense)/k', feedforward='/output/dense'),
        {},
        "IA3 scales outputs .*output/dense/kernel' is scaled",
    ),
    'before': (pj.PromptTuning(length=2), {}, "before them; 'bert/.*word_emb.*'@embeddings'"),
    'counted': (PROMPT, {}, "train them with side='back', or shift=False; got side='front'"),
    'no prompts': (
        dataclasses.replace(PROMPT, shift=False),
        {'model_type': 'llama'},
        'no prompt tuning for llama',
    ),
    'back of a causal one': (
        pj.PrefixTuning(length=2, side='back'),
        {'model_type': 'llama'},
        "train them with shift=False; got side='back'",
    ),
    'before rotations': (
        pj.PrefixTuning(target=('key/kernel', 'value/kernel'), length=2, side='back'),
        {},
        'target the names @key and @value',
    ),
    'gates': (
        pj.chain(
            pj.PrefixTuning(length=2, side='back'), dataclasses.replace(pj.PARALLEL, gate=True)
        ),
        {},
        'gate=True beside PrefixTuning has no counterpart',
    ),
    'no base': (
        pj.Dora(target='query/kernel', rank=2),
        {},
        "query/kernel' are needed. Pass params",
    ),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_adapterhub_cannot_hold(name, tmp_path):
    method, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=f'(?s){message}'):
        save(tmp_path, *adapter(method), **options)
    assert not list(tmp_path.iterdir())


def test_layers_that_differ_are_refused(tmp_path):
    method = pj.Lora(target='layer/0/.*query/k|layer/1/.*key/k', rank=2)
    with pytest.raises(ValueError, match=r"\['q'\] in layer 0 and \['k'\] in layer 1"):
        save(tmp_path, *adapter(method, scan_layers=False))
    prefix = pj.PrefixTuning(target=('@key/[12]', '@value/[12]'), length=2, side='back')
    plan, phi = adapter(prefix, scan_layers=False)
    with pytest.raises(ValueError, match=r'a prefix has all layers; this one has \[1, 2\] of 3'):
        save(tmp_path, plan, phi)
    plan, phi = adapter(dataclasses.replace(prefix, side='front'), scan_layers=False)
    with pytest.raises(ValueError, match=r'a prefix has all layers; this one has \[1, 2\] of 3'):
        pj.hf.save_adapter(tmp_path / 'peft', plan, phi, task_type='SEQ_CLS')
    assert not list(tmp_path.iterdir())


def test_a_bias_that_dora_leaves_alone_is_refused(tmp_path):
    """AdapterHub scales it with the output, so that nothing there computes the same."""
    apply_fn, shapes = bert()
    params = jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes)
    peft, phi = adapter(pj.Dora(target='query/kernel', rank=2))
    with pytest.raises(ValueError, match="query/kernel' has one that was not trained there"):
        save(tmp_path, peft, phi, params=params)
    with pytest.raises(ValueError, match='Pass params as arrays'):
        save(tmp_path, peft, phi, params=shapes)


def test_names_and_formats(tmp_path):
    peft, phi = adapter(QUERY)
    with pytest.raises(ValueError, match="one of peft, adapterhub; got 'hub'"):
        pj.hf.save_adapter(tmp_path / 'mine', peft, phi, format='hub')
    with pytest.raises(ValueError, match="format='peft' has no use for model_type"):
        pj.hf.save_adapter(tmp_path / 'mine', peft, phi, model_type='bert')
    with pytest.raises(ValueError, match="has no dot; got 'v1.2'"):
        save(tmp_path, peft, phi, name='v1.2')
    assert not list(tmp_path.iterdir())
