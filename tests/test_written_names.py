"""The names by which an adapter that is written finds its modules in the Hugging Face model."""

import json

import jax
import jax.numpy as jnp
import pytest
from test_round_trip import attached, equal

import peftjax as pj
from peftjax.models import (
    Decoder,
    Encoder,
    EncoderConfig,
    SequenceClassifier,
    read_decoder_config,
)

IDS = jax.ShapeDtypeStruct((2, 5), jnp.int32)
BERT = EncoderConfig(
    model_type='bert',
    vocab_size=9,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=16,
    num_labels=3,
)


def shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0), IDS)['params']


def targets(folder):
    return json.loads((folder / 'adapter_config.json').read_text())['target_modules']


@pytest.mark.parametrize('method', [pj.Lora(target='/kernel', rank=2), pj.Ia3(target='/kernel')])
def test_modules_that_only_the_other_model_has(method, tmp_path):
    """BERT's pooler is not adapted because the layers are."""
    encoder, classifier = Encoder(BERT), SequenceClassifier(BERT, head='classifier')
    body = {name: leaf for name, leaf in shapes(encoder).items() if name != 'pooler'}
    peft, phi = attached(method, encoder.apply_fn, body, IDS)
    folder = pj.hf.save_adapter(tmp_path / 'x', peft, phi)
    assert targets(folder) == ['intermediate.dense', 'key', 'output.dense', 'query', 'value']
    loaded = pj.hf.load_adapter(folder, classifier.apply_fn, shapes(classifier), IDS)
    assert {path.removeprefix('bert/') for path in loaded.phi} == set(phi)
    assert equal(pj.hf.load_adapter(folder, encoder.apply_fn, body, IDS).phi, phi)


def test_names_of_one_kind_of_module_are_short(tmp_path):
    sizes = {'vocab_size': 9, 'n_embd': 8, 'n_layer': 2, 'n_head': 2, 'n_positions': 16}
    model = Decoder(read_decoder_config({'model_type': 'gpt2', **sizes}))
    found = attached(pj.Lora(target='/kernel', rank=2), model.apply_fn, shapes(model), IDS)
    folder = pj.hf.save_adapter(tmp_path / 'x', *found)
    assert targets(folder) == ['attn.c_proj', 'c_attn', 'c_fc', 'mlp.c_proj']
