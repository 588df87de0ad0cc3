"""What the loader takes, and what it refuses by name."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from peftjax.models import EncoderConfig, load_encoder, parameter_shapes, read_config

KEY = jax.random.key(0)


def paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator='/'): leaf for p, leaf in leaves}


def test_names_are_hugging_faces(bert, tmp_path):
    folder = bert.write(tmp_path)
    scanned = paths(load_encoder(folder, 'classifier').params)
    assert scanned['bert/encoder/layer/attention/self/query/kernel'].shape == (2, 12, 12)
    assert scanned['bert/encoder/layer/attention/output/LayerNorm/scale'].shape == (2, 12)
    assert scanned['bert/embeddings/word_embeddings/embedding'].shape == (40, 12)
    unrolled = paths(load_encoder(folder, 'classifier', scan_layers=False).params)
    query = 'bert.encoder.layer.1.attention.self.query.weight'
    one = unrolled['bert/encoder/layer/1/attention/self/query/kernel']
    np.testing.assert_array_equal(one, bert.weights[query].T)
    assert len(unrolled) == len(bert.weights)


def test_an_encoder_ignores_the_heads_it_has_not(bert, tmp_path):
    loaded = load_encoder(bert.write(tmp_path))
    assert set(loaded.unused) == {
        'bert.pooler.dense.weight',
        'bert.pooler.dense.bias',
        'classifier.weight',
        'classifier.bias',
    }
    assert sorted(loaded.params) == ['embeddings', 'encoder']


def test_without_prefix_with_old_names_and_a_buffer(bert, tmp_path):
    old = {}
    for name, value in bert.weights.items():
        name = name.removeprefix('bert.')
        name = name.replace('LayerNorm.weight', 'LayerNorm.gamma')
        old[name.replace('LayerNorm.bias', 'LayerNorm.beta')] = value
    old['embeddings.position_ids'] = np.arange(16)[None]
    here = load_encoder(bert.write(tmp_path / 'new'), 'classifier').params
    there = load_encoder(bert.write(tmp_path / 'old', old), 'classifier').params
    jax.tree.map(np.testing.assert_array_equal, here, there)


def test_shards_equal_the_single_file(bert, tmp_path):
    single = load_encoder(bert.write(tmp_path / 'single'), 'classifier')
    folder = tmp_path / 'sharded'
    bert.write(folder)
    (folder / 'model.safetensors').unlink()
    weight_map = {}
    for index in range(3):
        part = dict(list(bert.weights.items())[index::3])
        save_file(part, folder / f'part-{index}.safetensors')
        weight_map |= dict.fromkeys(part, f'part-{index}.safetensors')
    index_file = folder / 'model.safetensors.index.json'
    index_file.write_text(json.dumps({'weight_map': weight_map}))
    sharded = load_encoder(folder, 'classifier')
    jax.tree.map(np.testing.assert_array_equal, single.params, sharded.params)

    weight_map['bert.extra'] = 'part-0.safetensors'
    index_file.write_text(json.dumps({'weight_map': weight_map}))
    with pytest.raises(ValueError, match=r'part-0\.safetensors must hold .*bert\.extra'):
        load_encoder(folder, 'classifier')
    index_file.write_text(json.dumps({'weight_map': {'a': '../part-0.safetensors'}}))
    with pytest.raises(ValueError, match=r"names the shard '\.\./part-0"):
        load_encoder(folder, 'classifier')
    index_file.write_text(json.dumps({'weight_map': {'a': 'part-9.safetensors'}}))
    with pytest.raises(FileNotFoundError, match=r'part-9\.safetensors, which does not exist'):
        load_encoder(folder, 'classifier')


def test_a_tensor_comes_from_the_file_that_the_index_names(bert, tmp_path):
    bert.write(tmp_path)
    (tmp_path / 'model.safetensors').unlink()
    first, *others = bert.weights
    save_file({first: bert.weights[first]}, tmp_path / 'a.safetensors')
    again = {name: bert.weights[name] for name in others} | {first: bert.weights[first] + 1}
    save_file(again, tmp_path / 'b.safetensors')
    weight_map = {first: 'a.safetensors'} | dict.fromkeys(others, 'b.safetensors')
    index_file = tmp_path / 'model.safetensors.index.json'
    index_file.write_text(json.dumps({'weight_map': weight_map}))
    loaded = load_encoder(tmp_path, 'classifier').params
    save_file(bert.weights, tmp_path / 'model.safetensors')
    jax.tree.map(np.testing.assert_array_equal, loaded, load_encoder(tmp_path, 'classifier').params)

    (tmp_path / 'model.safetensors').unlink()
    save_file({others[0]: bert.weights[others[0]], first: bert.weights[first]},
              tmp_path / 'a.safetensors')  # fmt: skip
    del weight_map[first]
    index_file.write_text(json.dumps({'weight_map': weight_map | {others[0]: 'a.safetensors'}}))
    with pytest.raises(ValueError, match=f'must say which file .*{re.escape(first)}'):
        load_encoder(tmp_path, 'classifier')


def test_numbers_that_would_become_others_are_refused_by_name(bert, tmp_path):
    name = 'bert.encoder.layer.1.output.dense.weight'
    codes = (1000 * bert.weights[name]).astype(np.int8)
    with pytest.raises(ValueError, match=rf"'{name}' must be stored as one of .* it is I8"):
        load_encoder(bert.write(tmp_path, bert.weights | {name: codes}), 'classifier')
    large = bert.weights[name].copy()
    large[2, 3], large[0, 0] = 1e6, np.inf
    folder = bert.write(tmp_path, bert.weights | {name: large})
    with pytest.raises(ValueError, match=rf"'{name}' must fit into float16: 1 of .* 1e\+06"):
        load_encoder(folder, 'classifier', dtype=jnp.float16)
    loaded = load_encoder(folder, 'classifier', dtype=jnp.bfloat16)  # what was infinite may be
    assert loaded.params['bert']['encoder']['layer']['output']['dense']['kernel'][1, 3, 2] > 9e5


def test_a_fresh_head_needs_a_key_and_is_reported(bert, tmp_path):
    body = {n: v for n, v in bert.weights.items() if not n.startswith('classifier')}
    folder = bert.write(tmp_path, body)
    with pytest.raises(ValueError, match=r'2 parameters were not filled \(classifier\.bias'):
        load_encoder(folder, 'mean', num_labels=5)
    loaded = load_encoder(folder, 'mean', num_labels=5, key=KEY)
    assert loaded.fresh == ('classifier/bias', 'classifier/kernel')
    assert loaded.params['classifier']['kernel'].shape == (12, 5)
    assert float(jnp.std(loaded.params['classifier']['kernel'])) > 0
    again = load_encoder(folder, 'mean', num_labels=5, key=KEY)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, again.params)


def test_a_key_replaces_the_head_of_the_checkpoint(bert, tmp_path):
    folder = bert.write(tmp_path)
    with pytest.raises(
        ValueError, match=r"classifier/bias needs 'classifier.bias' of shape \(7,\)"
    ):
        load_encoder(folder, 'classifier', num_labels=7)
    loaded = load_encoder(folder, 'classifier', num_labels=7, key=KEY)
    assert loaded.fresh == ('classifier/bias', 'classifier/kernel')
    assert set(loaded.unused) == {'classifier.bias', 'classifier.weight'}


@pytest.mark.parametrize(
    ('family', 'under'), [('bert', 'pooler.dense'), ('roberta', 'classifier.dense')]
)
def test_a_mean_classifier_is_not_one_of_another_head(family, under, request, tmp_path):
    golden = request.getfixturevalue(family)
    folder = golden.write(tmp_path)
    with pytest.raises(ValueError, match=rf"\(head='mean'\) must be one: .*{under}.*key=\.\.\."):
        load_encoder(folder, 'mean')
    loaded = load_encoder(folder, 'mean', key=KEY)
    assert loaded.fresh == ('classifier/bias', 'classifier/kernel')
    rest = [n for n in golden.weights if n.split('.')[0] == 'classifier' or 'pooler' in n]
    assert sorted(loaded.unused) == sorted(rest)


def test_a_pooler_is_drawn_only_where_there_is_none(bert, tmp_path):
    some = {n: v for n, v in bert.weights.items() if 'pooler' not in n}
    loaded = load_encoder(bert.write(tmp_path, some), 'pooler', key=KEY)
    assert loaded.fresh == ('pooler/dense/bias', 'pooler/dense/kernel')
    some['bert.pooler.dense.bias'] = bert.weights['bert.pooler.dense.bias']
    with pytest.raises(ValueError, match=r'not filled \(pooler\.dense\.weight\)'):
        load_encoder(bert.write(tmp_path, some), 'pooler', key=KEY)


def test_leftover_and_unfilled_are_refused_by_name(bert, tmp_path):
    wrong = dict(bert.weights)
    wrong['bert.encoder.layer.2.output.dense.bias'] = wrong.pop(
        'bert.encoder.layer.1.output.dense.bias'
    )
    match = re.escape(
        '1 parameters were not filled (encoder.layer.1.output.dense.bias), '
        '1 tensors were not used (bert.encoder.layer.2.output.dense.bias)'
    )
    with pytest.raises(ValueError, match=match):
        load_encoder(bert.write(tmp_path, wrong))


def test_one_parameter_under_two_names_is_refused(bert, tmp_path):
    twice = dict(bert.weights)
    twice['embeddings.LayerNorm.gamma'] = twice['bert.embeddings.LayerNorm.weight']
    with pytest.raises(ValueError, match=r"'(bert\.)?embeddings.LayerNorm.* are the same"):
        load_encoder(bert.write(tmp_path, twice))


@pytest.mark.parametrize('keep', [4, 100, -7])
def test_a_truncated_file_is_refused_by_name(bert, tmp_path, keep):
    file = tmp_path / 'model.safetensors'
    bert.write(tmp_path)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r'model\.safetensors must be a whole safetensors file'):
        load_encoder(tmp_path)


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pt'])
def test_pickles_are_refused(bert, tmp_path, name):
    bert.write(tmp_path)
    (tmp_path / 'model.safetensors').rename(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=f'{name}.*Convert to safetensors'):
        load_encoder(tmp_path)


def test_missing_folder_file_or_json(bert, tmp_path):
    with pytest.raises(FileNotFoundError, match='no such model folder'):
        load_encoder(tmp_path / 'absent')
    with pytest.raises(FileNotFoundError, match=r'must hold config\.json'):
        load_encoder(tmp_path)
    bert.write(tmp_path)
    (tmp_path / 'config.json').write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r'config\.json must be JSON'):
        load_encoder(tmp_path)


def test_an_unreachable_hub_is_named(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError('no route to host')

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
    with pytest.raises(ConnectionError, match=r"'owner/model' is no folder.*pass its path"):
        load_encoder('owner/model')


def test_a_template_of_its_own_file_is_downloaded_and_no_weights_twice(bert, tmp_path, monkeypatch):
    import huggingface_hub

    bert.write(tmp_path)
    asked = {}
    download = lambda name, **how: asked.update(how) or str(tmp_path)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    load_encoder('owner/model')
    assert '*.jinja' in asked['allow_patterns'] and 'original/*' in asked['ignore_patterns']


@pytest.mark.parametrize(
    ('change', 'match'),
    [
        ({'model_type': 'gpt2'}, "model_type must be one of .*'gpt2'"),
        ({'model_type': None}, 'model_type must be one of .*None'),
        ({'position_embedding_type': 'relative_key'}, "position_embedding_type must be 'absolute'"),
        ({'is_decoder': True}, 'is_decoder must be False'),
        ({'add_cross_attention': True}, 'add_cross_attention must be False'),
        ({'hidden_act': 'mish'}, "hidden_act must be one of .*'mish'"),
        ({'num_attention_heads': 5}, 'hidden_size must be a multiple'),
        ({'vocab_size': None}, r"missing: \['vocab_size'\]"),
        ({'intermediate_size': 0}, 'intermediate_size must be a whole number above zero, got 0'),
        ({'num_attention_heads': 0}, 'num_attention_heads must be a whole number above zero'),
    ],
)
def test_unsupported_configs_are_refused_by_field(bert, change, match):
    fields = bert.config | change
    with pytest.raises(ValueError, match=match):
        read_config(fields)
    absent = {k: v for k, v in fields.items() if v is not None}
    with pytest.raises(ValueError, match=match):
        read_config(absent)


def test_the_config_reads_labels_and_family_defaults(bert, roberta):
    config = read_config(bert.config)
    assert isinstance(config, EncoderConfig) and config.num_labels == 3
    fields = {k: v for k, v in roberta.config.items() if k != 'pad_token_id'}
    assert read_config(fields).position_offset == 2
    with pytest.raises(ValueError, match="head must be None, 'pooler'"):
        load_encoder('.', 'lm')


def test_dtype_and_sharding(bert, tmp_path):
    device = jax.devices()[-1]
    seen = []

    def where(path):
        seen.append(path)
        return jax.sharding.SingleDeviceSharding(device)

    loaded = load_encoder(bert.write(tmp_path), dtype=jnp.bfloat16, sharding=where)
    leaves = paths(loaded.params)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in leaves.values())
    assert all(leaf.devices() == {device} for leaf in leaves.values())
    assert sorted(seen) == sorted(leaves) == sorted(parameter_shapes(loaded.model))
    name = 'bert.embeddings.word_embeddings.weight'
    expected = bert.weights[name].astype(jnp.bfloat16)
    np.testing.assert_array_equal(leaves['embeddings/word_embeddings/embedding'], expected)


def test_the_import_is_light():
    heavy = "{'torch', 'transformers', 'tokenizers', 'safetensors', 'huggingface_hub', 'orbax'}"
    code = f'import sys, peftjax; a = set(sys.modules); import peftjax.models; \
assert not {heavy} & (set(sys.modules) - a), {heavy} & (set(sys.modules) - a)'
    subprocess.run([sys.executable, '-c', code], check=True)
