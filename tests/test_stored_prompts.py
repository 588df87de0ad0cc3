"""A prompt of Hugging Face PEFT, over tables whose rows are multiplied when they are looked up."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import peftjax as pj
from peftjax.models import Compute, Decoder, read_decoder_config

TABLE = 'model/embed_tokens/embedding'
REAL, IDS = [9, 3], jnp.asarray([[5, 6, 7, 8]])
SIZES = {
    'vocab_size': 16,
    'hidden_size': 12,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'num_key_value_heads': 1,
    'head_dim': 4,
    'intermediate_size': 8,
    'sliding_window': 8,
}
SCALES = {
    ('llama', 'float32'): 1,
    ('gemma2', 'float32'): 12**0.5,
    ('gemma3_text', 'float32'): 12**0.5,
    ('gemma3_text', 'bfloat16'): 3.46875,
}
GEMMA = 'multiplied with 3.464.: the prompt is stored multiplied, as Gemma has it since'


@functools.cache
def model(kind, dtype='float32'):
    model = Decoder(read_decoder_config({'model_type': kind, **SIZES}), Compute(dtype=dtype))
    params = jax.eval_shape(model.init, jax.random.key(0), IDS)['params']
    draw = lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape) / 2
    return model.apply_fn, jax.tree.map(draw, params)


def stored(folder, rows):
    folder.mkdir()
    kind = {'peft_type': 'PROMPT_TUNING', 'num_virtual_tokens': len(rows), 'task_type': 'CAUSAL_LM'}
    (folder / 'adapter_config.json').write_text(json.dumps(kind))
    save_file({'prompt_embeddings': np.asarray(rows)}, folder / 'adapter_model.safetensors')
    return folder


@pytest.mark.parametrize(('kind', 'dtype'), SCALES)
@pytest.mark.filterwarnings('ignore:.*multiplied with 3.46')
def test_what_the_table_yields_for_a_token_is_that_token(kind, dtype, tmp_path):
    """`embed_tokens(ids)` of transformers as a prompt, and the tokens themselves."""
    apply_fn, params = model(kind, dtype)
    table = params['model']['embed_tokens']['embedding'][jnp.asarray(REAL)]
    folder = stored(tmp_path / 'x', table * SCALES[kind, dtype])
    loaded = pj.hf.load_adapter(folder, apply_fn, params, IDS)
    out = jax.jit(loaded.peft.wrap(apply_fn))(params, loaded.phi, IDS)
    tokens = jnp.concatenate([jnp.asarray([REAL]), IDS], axis=1)
    wanted = jax.jit(apply_fn)(params, tokens)[:, len(REAL) :]
    np.testing.assert_allclose(out, wanted, atol=1e-5 if dtype == 'float32' else 2e-2)
    again = pj.hf.save_adapter(tmp_path / 'y', loaded.peft, loaded.phi, task_type='CAUSAL_LM')
    files = [load_file(f / 'adapter_model.safetensors') for f in (folder, again)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *files)


def test_that_a_prompt_is_stored_multiplied_is_said(tmp_path):
    apply_fn, params = model('gemma2')
    with pytest.warns(UserWarning, match=GEMMA):
        loaded = pj.hf.load_adapter(
            stored(tmp_path / 'x', np.ones((2, 12), 'f')), *model('gemma2'), IDS
        )
    assert len(loaded.notes) == 1
    with pytest.warns(UserWarning, match=GEMMA):
        pj.hf.save_adapter(tmp_path / 'y', loaded.peft, loaded.phi, task_type='CAUSAL_LM')
    llama = stored(tmp_path / 'z', np.ones((2, 12), 'f'))
    assert not pj.hf.load_adapter(llama, *model('llama'), IDS).notes


def looked_up(times):
    """A model that does something with what it looks up."""
    params = {'embed_tokens': {'embedding': jnp.ones((9, 4))}, 'by': jnp.asarray(3.0)}
    return lambda p, ids: times(lambda: p['embed_tokens']['embedding'][ids], p), params


UNKNOWN = {
    'a parameter': lambda rows, p: rows() * p['by'],
    'an array': lambda rows, p: rows() * jnp.arange(4.0),
    'two numbers': lambda rows, p: 2 * rows() + 3 * rows(),
    'divides': lambda rows, p: 2 / rows(),
}


@pytest.mark.parametrize('name', UNKNOWN)
def test_what_is_not_one_number_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"looked up in 'embed_tokens/embedding' must be mult"):
        pj.hf.load_adapter(
            stored(tmp_path / 'x', np.ones((2, 4), 'f')), *looked_up(UNKNOWN[name]), IDS
        )


def test_a_plan_that_does_not_say_it_is_attached_once_more(tmp_path):
    apply_fn, params = looked_up(lambda rows, p: rows())
    peft = pj.attach(pj.PromptTuning(length=2), apply_fn, params, IDS)
    phi = peft.init(jax.random.key(0), params)
    pj.hf.save_adapter(tmp_path / 'x', peft, phi, task_type='CAUSAL_LM')
    [[site]] = peft.sites
    old = dataclasses.replace(peft, sites=((dataclasses.replace(site, scale=None),),))
    with pytest.raises(ValueError, match='Attach the method once more'):
        pj.hf.save_adapter(tmp_path / 'y', old, phi, task_type='CAUSAL_LM')
