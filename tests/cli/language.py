"""A tiny Llama in a Hugging Face folder, and adapters of it as the commands leave them."""

import pathlib

import jax
import jax.numpy as jnp

import peftjax as pj
from peftjax import models

FIELDS = {
    'model_type': 'llama',
    'architectures': ['LlamaForCausalLM'],
    'vocab_size': 40,
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'initializer_range': 0.2,
    'max_position_embeddings': 64,
}
CONFIG = models.read_decoder_config(FIELDS)
IDS = jnp.array([[5, 6, 7, 8, 1, 2], [9, 3, 3, 30, 39, 4]], jnp.int32)
METHODS = {
    'lora': pj.Lora(target=models.linears(CONFIG), rank=4, alpha=6),
    'prefix': pj.PrefixTuning(length=3),
    'adapter': pj.HOULSBY,
    'saved': pj.chain(pj.Ia3(target='(k|v)_proj/k'), saved=pj.Trainable(target='lm_head')),
}


def write_model(folder: pathlib.Path) -> str:
    """Writes the model, with a file of a tokenizer."""
    params = models.Decoder(CONFIG).init(jax.random.key(0), IDS)['params']
    models.save_decoder(folder, CONFIG, params)
    (folder / 'tokenizer.json').write_text('{}')
    return str(folder)


def write_adapter(folder: pathlib.Path, model: str, name: str) -> str:
    """Writes an adapter away from its beginning."""
    base = models.load_decoder(model)
    peft = pj.attach(METHODS[name], base.model.apply_fn, base.params, IDS)
    keys = iter(jax.random.split(jax.random.key(1), 99))
    move = lambda a: a + 0.1 * jax.random.normal(next(keys), a.shape)
    phi = jax.tree.map(move, peft.init(jax.random.key(2), base.params))
    about = {'task': 'language-model', 'model': model, 'max_tokens': 16, 'method': name, 'seed': 2}
    metadata = {**about, 'settings': {}}
    pj.save(folder, peft, phi, params=base.params, metadata=metadata)
    return str(folder)


def adapted(adapter: str) -> jax.Array:
    """Logits of the model with an adapter over it."""
    loaded = pj.load(adapter)
    base = models.load_decoder(loaded.metadata['model'])
    return jax.jit(loaded.peft.wrap(base.model.apply_fn))(base.params, loaded.phi, IDS)
