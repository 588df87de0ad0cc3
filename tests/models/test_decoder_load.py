"""What the decoder's loader takes and writes, and what it refuses by name."""

import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import load_file

from peftjax.models import Decoder, load_decoder, read_decoder_config, save_decoder
from peftjax.models._fill import by_path

FIELDS = {
    'model_type': 'llama',
    'vocab_size': 40,
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_hidden_layers': 3,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
}
MIXTRAL = FIELDS | {'model_type': 'mixtral', 'num_local_experts': 4}
GEMMA3 = {'model_type': 'gemma3_text'}
YARN = {'type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32}
SHORT_LONG = {'short_factor': [1.0, 1.5], 'long_factor': [4.0, 9.0]}
QUERY = 'model.layers.1.self_attn.q_proj.weight'


def write(folder, fields, change=None, **how):
    """A folder of a fresh decoder, with other tensors where `change` edits them."""
    from safetensors.numpy import save_file

    config = read_decoder_config(fields)
    params = Decoder(config).init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))['params']
    save_decoder(folder, config, params, **how)
    if change is not None:
        tensors = load_file(folder / 'model.safetensors')
        change(tensors)
        save_file(tensors, folder / 'model.safetensors')
    return folder


def test_names_are_hugging_faces_and_layers_and_experts_are_stacked(tmp_path):
    folder = write(tmp_path / 'mixtral', MIXTRAL)
    with safe_open(folder / 'model.safetensors', 'numpy') as file:
        name = 'model.layers.2.block_sparse_moe.experts.3.w2.weight'
        assert file.get_slice(name).get_shape() == [16, 24]
        stored = file.get_tensor(name)
    scanned = by_path(load_decoder(folder).params)
    experts = scanned['model/layers/block_sparse_moe/experts/w2/kernel']
    assert experts.shape == (3, 4, 24, 16)
    np.testing.assert_array_equal(experts[2, 3], stored.T)
    flat = by_path(load_decoder(folder, scan_layers=False).params)
    np.testing.assert_array_equal(
        flat['model/layers/2/block_sparse_moe/experts/w2/kernel'][3], stored.T
    )


def test_shards_equal_the_single_file(tmp_path):
    single = load_decoder(write(tmp_path / 'single', FIELDS))
    folder = write(tmp_path / 'sharded', FIELDS, shard_bytes=4000)
    index = json.loads((folder / 'model.safetensors.index.json').read_text())
    assert len(set(index['weight_map'].values())) > 3
    jax.tree.map(np.testing.assert_array_equal, single.params, load_decoder(folder).params)


def test_a_checkpoint_without_the_prefix_and_with_buffers(tmp_path):
    def bare(tensors):
        for name in list(tensors):
            tensors[name.removeprefix('model.')] = tensors.pop(name)
        tensors['layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(2, np.float32)

    here = load_decoder(write(tmp_path / 'one', FIELDS))
    there = load_decoder(write(tmp_path / 'two', FIELDS, bare))
    jax.tree.map(np.testing.assert_array_equal, here.params, there.params)


def test_leftover_and_unfilled_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=rf'1 parameters were not filled .*{QUERY[6:]}'):
        load_decoder(write(tmp_path / 'a', FIELDS, lambda t: t.pop(QUERY)))
    extra = lambda t: t.update({'model.layers.3.self_attn.q_proj.weight': t[QUERY].copy()})
    with pytest.raises(ValueError, match=r'1 tensors were not used \(model\.layers\.3\.self'):
        load_decoder(write(tmp_path / 'b', FIELDS, extra))
    wide = lambda t: t.update({QUERY: np.ones((16, 8), np.float32)})
    with pytest.raises(ValueError, match=rf"q_proj/kernel needs '{QUERY}' of shape \(16, 16\)"):
        load_decoder(write(tmp_path / 'c', FIELDS, wide))


def test_a_tied_head_may_be_stored_again_but_not_another(tmp_path):
    tied = FIELDS | {'tie_word_embeddings': True}
    name = 'model.embed_tokens.weight'
    again = lambda t: t.update({'lm_head.weight': t[name].copy()})
    assert 'lm_head' not in load_decoder(write(tmp_path / 'a', tied, again)).params
    other = lambda t: t.update({'lm_head.weight': t[name] + 1})
    with pytest.raises(ValueError, match=r"'lm_head.weight' must equal 'model.embed_tokens"):
        load_decoder(write(tmp_path / 'b', tied, other))


def test_each_device_gets_its_part(tmp_path):
    folder = write(tmp_path / 'model', MIXTRAL)
    mesh = jax.make_mesh((2, 2), ('x', 'y'), devices=jax.devices()[:4])

    def sharding(path):
        whole = path.endswith('scale')
        if 'experts' in path:
            return NamedSharding(mesh, P(None, 'x', 'y'))
        return NamedSharding(mesh, P() if whole else P(*[None] * ('layers' in path), 'x'))

    here, there = load_decoder(folder), load_decoder(folder, sharding=sharding, dtype=jnp.bfloat16)
    for path, leaf in by_path(there.params).items():
        assert leaf.sharding == sharding(path) and leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, by_path(here.params)[path].astype(jnp.bfloat16))


def test_no_more_is_held_than_the_model_and_half_of_one_tensor(tmp_path):
    fields = FIELDS | {'hidden_size': 256, 'intermediate_size': 512, 'vocab_size': 4000}
    folder = write(tmp_path / 'model', fields, shard_bytes=10**6)
    mesh = jax.make_mesh((2,), ('x',), devices=jax.devices()[:2])
    along = lambda path: NamedSharding(mesh, P('x') if 'embed' in path else P())
    for options in ({}, {'dtype': jnp.bfloat16}, {'sharding': along}):
        load_decoder(folder, **options)  # imports, and what is traced once
        tracemalloc.start()
        params = load_decoder(folder, **options).params
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        model = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        largest = 4 * 4000 * 256  # large beside what tracing leaves for the garbage collector
        assert model < peak < model + largest / 2, (options, model, peak)


def test_only_what_is_the_configs_is_saved_and_nothing_is_replaced(tmp_path):
    folder = write(tmp_path / 'model', FIELDS)
    loaded = load_decoder(folder, dtype=jnp.bfloat16)
    with pytest.raises(FileExistsError, match='something at .* already'):
        save_decoder(folder, loaded.config, loaded.params)
    body = {k: v for k, v in loaded.params['model'].items() if k != 'norm'}
    with pytest.raises(ValueError, match=r"1 are missing \['model/norm/scale'\]"):
        save_decoder(tmp_path / 'new', loaded.config, loaded.params | {'model': body})
    assert not (tmp_path / 'new').exists()
    with pytest.raises(
        FileNotFoundError, match='no such folder to take a tokenizer from: .*nowhere'
    ):
        save_decoder(
            tmp_path / 'new', loaded.config, loaded.params, tokenizer_of=tmp_path / 'nowhere'
        )
    assert not (tmp_path / 'new').exists()
    save_decoder(tmp_path / 'new', loaded.config, loaded.params)
    fields = json.loads((tmp_path / 'new' / 'config.json').read_text())
    assert fields == FIELDS | {'torch_dtype': 'bfloat16'}
    again = load_decoder(tmp_path / 'new', dtype=jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, again.params)


def test_a_config_that_was_changed_is_not_saved_as_it_was(tmp_path):
    config = read_decoder_config(FIELDS)
    wide = dataclasses.replace(config, vocab_size=50)
    ids = jnp.ones((1, 2), jnp.int32)
    params = Decoder(wide).init(jax.random.key(0), ids)['params']
    with pytest.raises(ValueError, match=r"changed after, in \['vocab_size'\]\. Change the fields"):
        save_decoder(tmp_path / 'wide', wide, params)
    assert not (tmp_path / 'wide').exists()
    fields = json.loads(config.source) | {'vocab_size': 50}
    save_decoder(tmp_path / 'wide', read_decoder_config(fields), params)
    assert load_decoder(tmp_path / 'wide').config.vocab_size == 50
    by_hand = dataclasses.replace(config, source='')
    with pytest.raises(ValueError, match='was made by hand. Make it with read_decoder_config'):
        save_decoder(tmp_path / 'new', by_hand, params)


@pytest.mark.parametrize(
    ('change', 'match'),
    [
        ({'model_type': 'bloom'}, "model_type must be one of .*'bloom'"),
        ({'vocab_size': None}, r"missing: \['vocab_size'\]"),
        ({'hidden_act': 'mish'}, "activation must be one of .*'mish'"),
        ({'num_key_value_heads': 3}, 'must be a multiple of the number of key and value heads'),
        ({'rope_scaling': {'rope_type': 'mrope'}}, "rope_type must be one of .*'mrope'"),
        ({'rope_scaling': {'rope_type': 'linear'}}, "must hold 'factor' for rope_type 'linear'"),
        ({'quantization_config': {'bits': 4}}, 'quantization_config must be None'),
        ({'model_type': 'gemma2', 'use_bidirectional_attention': True}, 'must be False'),
        ({'model_type': 'qwen3_moe', 'mlp_only_layers': [0]}, r'mlp_only_layers must be \[\]'),
        ({'model_type': 'qwen2', 'layer_types': ['chunked_attention'] * 3}, 'layer_types must'),
        ({'model_type': 'mixtral', 'num_experts_per_tok': 9}, 'served by 1 to 8 experts, got 9'),
        ({'intermediate_size': None}, r"missing: \['intermediate_size'\]"),
        ({'model_type': 'qwen3_moe'}, r"missing: \['moe_intermediate_size'\]"),
        ({'model_type': 'gemma2', 'sliding_window': None}, r"missing: \['sliding_window'\]"),
        (GEMMA3 | {'sliding_window': None}, r"missing: \['sliding_window'\]"),
        (GEMMA3 | {'sliding_window_pattern': None}, 'sliding_window_pattern must be a whole num'),
        ({'hidden_size': '16'}, "hidden_size must be a whole number above zero, got '16'"),
        ({'num_attention_heads': 0}, 'num_attention_heads must be a whole number above zero'),
        ({'num_key_value_heads': 0}, 'there is one at least, got 4 and 0'),
        ({'rope_scaling': YARN | SHORT_LONG}, r"'yarn' .*\['long_factor', 'short_factor'\] would"),
        (
            {'rope_scaling': {'factor': 2.0}},
            r"rope_type 'default' .*\['factor'\] would not be used",
        ),
    ],
)
def test_unsupported_configs_are_refused_by_field(change, match):
    with pytest.raises(ValueError, match=match):
        read_decoder_config(FIELDS | change)


def test_old_and_new_files_say_the_same():
    old = FIELDS | {
        'model_type': 'gemma3_text',
        'sliding_window_pattern': 2,
        'rope_theta': 5e5,
        'rope_local_base_freq': 2e4,
        'rope_scaling': {'type': 'linear', 'factor': 8.0},
    }
    new = FIELDS | {
        'model_type': 'gemma3_text',
        'rope_parameters': {
            'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 5e5},
            'sliding_attention': {'rope_type': 'default', 'rope_theta': 2e4},
        },
        'layer_types': ['sliding_attention', 'full_attention', 'sliding_attention'],
    }
    assert read_decoder_config(old).kinds == read_decoder_config(new).kinds


@pytest.mark.parametrize('old', ['su', 'yarn'])
def test_phi3_calls_longrope_otherwise(old):
    lengths = {'max_position_embeddings': 128, 'original_max_position_embeddings': 32}
    read = lambda name, key: read_decoder_config(
        FIELDS | lengths | {'model_type': 'phi3', key: {'type': name} | SHORT_LONG}
    )
    longrope = read('longrope', 'rope_scaling')
    rope = longrope.kinds[0].rope
    assert rope is not None and (rope.scaling, rope.long) == ('longrope', (4.0, 9.0))
    for key in ('rope_scaling', 'rope_parameters'):
        assert read(old, key).kinds == longrope.kinds


@pytest.mark.parametrize(
    ('scaling', 'kind'),
    [
        (YARN | {'finetuned': True, 'beta_fast': 32, 'mscale': 1.0, 'truncate': False}, 'yarn'),
        ({'type': 'dynamic', 'factor': 2.0, 'original_max_position_embeddings': 32}, 'dynamic'),
        ({'rope_type': 'default', 'type': 'default', 'rope_theta': 5e5}, 'default'),
        ({'type': 'linear', 'factor': 8.0, 'partial_rotary_factor': 0.5}, 'linear'),
        ({'type': 'longrope', 'attention_factor': None} | SHORT_LONG, 'longrope'),
    ],
)
def test_what_files_say_beside_the_numbers_of_their_rotation_is_taken(scaling, kind):
    config = read_decoder_config(FIELDS | {'max_position_embeddings': 64, 'rope_scaling': scaling})
    assert config.kinds[0].rope is not None and config.kinds[0].rope.scaling == kind


@pytest.mark.parametrize(
    ('fields', 'windows'),
    [
        ({'model_type': 'qwen2', 'max_window_layers': 1}, [4096]),
        ({'model_type': 'qwen2', 'max_window_layers': 0, 'sliding_window': None}, [None]),
        ({'model_type': 'qwen3_moe', 'moe_intermediate_size': 8, 'num_key_value_heads': 2}, [4096]),
        ({'model_type': 'mistral'}, [4096]),
        ({'model_type': 'mistral', 'sliding_window': None}, [None]),
        (GEMMA3 | {'layer_types': ['full_attention'] * 3, 'sliding_window_pattern': None}, [None]),
    ],
)
def test_a_null_is_not_an_absent_field(fields, windows):
    config = read_decoder_config(FIELDS | {'use_sliding_window': True} | fields)
    assert [kind.window for kind in config.kinds][-1:] == windows


def test_the_older_name_of_the_rotation_goes_first():
    linear, plain = {'rope_type': 'linear', 'factor': 4.0}, {'rope_type': 'default'}
    read = lambda fields: read_decoder_config(FIELDS | fields).kinds
    both = {'rope_scaling': linear, 'rope_parameters': plain | {'rope_theta': 1e3}}
    assert read(both) == read({'rope_scaling': linear})
    full = {'rope_parameters': {'full_attention': {'rope_theta': 1e3}, 'sliding_attention': None}}
    both = GEMMA3 | full | {'rope_scaling': linear}
    assert read(both) == read(GEMMA3 | {'rope_scaling': linear, 'rope_theta': 1e3})


def test_gemma3_scales_by_its_scalar_and_caps_no_scores():
    attention = read_decoder_config(FIELDS | GEMMA3 | {'attn_logit_softcapping': 50.0}).attention
    assert attention.soft_cap is None and attention.scale == 256**-0.5
    gemma2 = read_decoder_config(FIELDS | {'model_type': 'gemma2'}).attention
    assert gemma2.soft_cap == 50.0
