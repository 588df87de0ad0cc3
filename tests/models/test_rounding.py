"""Weights rounded while they are read: equal to those rounded as a whole, which are never held."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_decoder_load import FIELDS, MIXTRAL, write

import peftjax as pj
from peftjax.models import (
    Compute,
    Decoder,
    _rounding,
    abstract_decoder,
    embeddings,
    is_quantized,
    linears,
    load_decoder,
    quantize_decoder,
    read_decoder_config,
)
from peftjax.models._fill import by_path

GPT2 = {
    'model_type': 'gpt2', 'vocab_size': 40, 'n_embd': 16, 'n_layer': 2, 'n_head': 4,
    'n_positions': 32,
}  # fmt: skip


def check_equal(found, wanted):
    """The same leaves, quantized in the same way."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('fields', 'how', 'scheme', 'target'),
    [
        (FIELDS, {}, pj.NF4, ('embed', 'down_proj/kernel', 'norm/scale')),
        (MIXTRAL, {}, pj.INT8, None),
        (GPT2, {'scan_layers': False, 'dtype': jnp.bfloat16}, pj.NF4, None),
    ],
    ids=['llama', 'mixtral', 'gpt2'],
)
def test_what_is_rounded_on_the_way_is_what_is_rounded_afterwards(
    tmp_path, monkeypatch, fields, how, scheme, target
):
    monkeypatch.setattr(_rounding, 'PART', 15 * 16)  # some rows of a layer at a time
    folder = write(tmp_path / 'model', fields)
    dense = load_decoder(folder, **how)
    found = load_decoder(folder, **how, scheme=scheme, target=target).params
    check_equal(found, pj.quantize(dense.params, scheme, target=target or linears(dense.config)))


def test_what_is_rounded_lies_as_it_is_told(tmp_path):
    folder = write(tmp_path / 'model', FIELDS)
    mesh = jax.make_mesh((2,), ('x',), devices=jax.devices()[:2])
    where = NamedSharding(mesh, P(None, 'x'))
    along = lambda path: where if path.endswith('q_proj/kernel') else NamedSharding(mesh, P())
    here = load_decoder(folder, scheme=pj.NF4).params
    there = load_decoder(folder, scheme=pj.NF4, sharding=along).params
    check_equal(there, here)
    codes = there['model']['layers']['self_attn']['q_proj']['kernel'].codes
    assert codes.sharding.shard_shape(codes.shape) == (3, 8, 8)


@pytest.mark.slow
def test_no_more_is_held_than_the_quantized_model_and_one_layer(tmp_path):
    # a layer is large beside what tracing leaves for the garbage collector, half a megabyte
    fields = FIELDS | {'hidden_size': 256, 'intermediate_size': 512, 'num_hidden_layers': 16}
    folder = write(tmp_path / 'model', fields)
    load_decoder(folder, scheme=pj.NF4)  # imports, and what is traced once
    tracemalloc.start()
    params = load_decoder(folder, scheme=pj.NF4).params
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    dense = sum(leaf.nbytes for leaf in jax.tree.leaves(pj.dequantize(params)))
    assert peak < held + dense / 16, (held, peak, dense)


def say(folder, **fields):
    """Changes what config.json says; None takes it away."""
    file = folder / 'config.json'
    said = {k: v for k, v in (json.loads(file.read_text()) | fields).items() if v is not None}
    file.write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize('said', ['float16', 'auto', None])
def test_dtypes_are_those_of_the_weights_whatever_the_config_says(tmp_path, said):
    def half(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(jnp.bfloat16)
        tensors['model.layers.1.input_layernorm.weight'] = np.full(16, 1.001, np.float32)

    folder = say(write(tmp_path / 'model', FIELDS, half), torch_dtype=said)
    dtypes = lambda path: {k: x.dtype for k, x in by_path(abstract_decoder(path).params).items()}
    assert set(dtypes(folder).values()) == {np.dtype(jnp.bfloat16)}
    made = quantize_decoder(folder, tmp_path / 'small', pj.NF4)
    dense = load_decoder(folder)
    norms = 3 * 16 * 2  # in float32, since one layer's is
    assert made.before == 2 * sum(x.size for x in jax.tree.leaves(dense.params)) + norms
    stored = pj.quantize(dense.params, pj.NF4, target=linears(dense.config))
    check_equal(load_decoder(made.folder).params, stored)
    small = abstract_decoder(made.folder)
    assert small.model.compute.dtype == jnp.bfloat16
    assert small.params['model']['norm']['scale'].dtype == jnp.bfloat16


LLAMA_1B = {
    'model_type': 'llama', 'vocab_size': 128256, 'hidden_size': 2048, 'intermediate_size': 8192,
    'num_hidden_layers': 16, 'num_attention_heads': 32, 'num_key_value_heads': 8, 'head_dim': 64,
    'tie_word_embeddings': True,
}  # fmt: skip


def test_the_shapes_of_llama_1b_shrink_to_a_quarter_with_their_table():
    config = read_decoder_config(LLAMA_1B)
    model, ids = Decoder(config, Compute(param_dtype=jnp.bfloat16)), jnp.ones((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)['params']
    nbytes = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    assert nbytes(shapes) == 2 * 1_235_814_400
    part = lambda *target: nbytes(pj.quantize(shapes, pj.NF4, target=target)) / nbytes(shapes)
    assert part(linears(config), embeddings(config)) < 0.26
    assert 0.40 < part(linears(config)) < 0.42  # a table of 263 million numbers stays dense


def test_what_cannot_be_rounded_is_said(tmp_path):
    folder = write(tmp_path / 'model', FIELDS)
    with pytest.raises(ValueError, match='a target needs a scheme'):
        load_decoder(folder, target='kernel')
    with pytest.raises(ValueError, match="no leaf matches target='wte'"):
        load_decoder(folder, scheme=pj.NF4, target='wte')
    quantize_decoder(folder, tmp_path / 'small', pj.NF4)
    assert is_quantized(tmp_path / 'small') and not is_quantized(folder)
    with pytest.raises(ValueError, match='small is quantized already. Take it as it is'):
        load_decoder(tmp_path / 'small', scheme=pj.NF4)
    with pytest.raises(ValueError, match='small is quantized already'):
        quantize_decoder(tmp_path / 'small', tmp_path / 'smaller', pj.NF4)
