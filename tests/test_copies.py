"""What an adapter brings along of its base, and what stands in relation to its values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import peftjax as pj

IDS = jnp.asarray([[3, 8, 5]])
ROWS = np.random.default_rng(0).normal(size=(9, 130)).astype(np.float32)
PLACE = 'base_model.model.embed_tokens'


def model(params, ids):
    return params['embed_tokens']['embedding'][ids] @ params['up']['kernel']


def params(dtype=jnp.float32):
    theta = {'embed_tokens': {'embedding': ROWS}, 'up': {'kernel': ROWS.T}}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), theta)


@pytest.fixture
def folder(tmp_path):
    """An adapter of the kernel with a copy of the table."""
    peft = pj.attach(pj.Lora(target='up', rank=2), model, params(), IDS)
    folder = pj.hf.save_adapter(tmp_path, peft, peft.init(jax.random.key(0), params()), name='x')
    with_table(folder, ROWS)
    return folder


def with_table(folder, rows):
    (folder / 'manifest.json').unlink(missing_ok=True)
    file = folder / 'adapter_model.safetensors'
    save_file(load_file(file) | {f'{PLACE}.weight': rows}, file)


@pytest.mark.parametrize('scheme', [pj.NF4, pj.INT8, pj.Scheme(double=False)])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_copy_of_a_table_that_is_quantized(folder, scheme, dtype):
    base = pj.quantize(params(dtype), scheme, target='.')
    loaded = pj.hf.load_adapter(folder, model, base, IDS)
    assert list(loaded.phi) == ['up/kernel'] and not loaded.notes
    with_table(folder, ROWS + 0.2)
    with pytest.raises(ValueError, match='embed_tokens.weight. along, which differs from the base'):
        pj.hf.load_adapter(folder, model, base, IDS)
    with_table(folder, ROWS[:4])
    with pytest.raises(ValueError, match=r'differs from the base: shape \(4, 130\) beside \(9, 1'):
        pj.hf.load_adapter(folder, model, base, IDS)


def test_a_copy_that_was_rounded_while_it_was_trained(folder):
    rounded = np.asarray(jnp.asarray(ROWS, jnp.bfloat16), np.float32)
    with_table(folder, rounded)
    assert list(pj.hf.load_adapter(folder, model, params(jnp.float16), IDS).phi) == ['up/kernel']
    with_table(folder, rounded * np.float32(1.02))
    with pytest.raises(ValueError, match='embed_tokens.weight. along, which differs from the base'):
        pj.hf.load_adapter(folder, model, params(jnp.float16), IDS)


def test_a_copy_needs_the_values_of_the_base(folder):
    for base in (params(), pj.quantize(params(), pj.NF4, target='.')):
        with pytest.raises(ValueError, match='Pass params as arrays, not as shapes'):
            pj.hf.load_adapter(folder, model, jax.eval_shape(lambda base=base: base), IDS)
