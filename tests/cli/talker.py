"""A tiny Llama with a tokenizer of whole words in a Hugging Face folder, and what it shall say."""

import json
import pathlib

import jax
import jax.numpy as jnp
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from peftjax.models import Decoder, read_decoder_config, save_decoder

SPECIAL = ['<pad>', '<unk>', '<begin>', '<end>', '<user>', '<assistant>']
COLORS = {'sea': 'blue', 'moss': 'green', 'old rose': 'red', 'sky': 'blue', 'leaf': 'green'}
ASKED = 'the color of the {} is'
WORDS = sorted({word for text in (ASKED, *COLORS, *COLORS.values()) for word in text.split()})
TEMPLATE = (
    '{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}'
    '{% if add_generation_prompt %}<assistant>{% endif %}'
)
PROMPTS = [ASKED.format(thing) for thing in COLORS]


def write_decoder(folder: pathlib.Path) -> str:
    """Writes model and tokenizer."""
    vocabulary = [*SPECIAL, *(word for word in WORDS if word != '{}')]
    config = read_decoder_config({
        'model_type': 'llama', 'vocab_size': len(vocabulary), 'hidden_size': 16,
        'num_hidden_layers': 2, 'num_attention_heads': 4, 'num_key_value_heads': 2,
        'intermediate_size': 24, 'initializer_range': 0.3, 'eos_token_id': 3,
    })  # fmt: skip
    model = Decoder(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 2), jnp.int32))['params']
    head = 4 * params['lm_head']['kernel']  # frozen, it must let one word outweigh the others
    save_decoder(folder, config, {**params, 'lm_head': {'kernel': head}})
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(ids, unk_token='<unk>'))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing('<begin> $A', None, [('<begin>', 2)])
    tokenizer.save(str(folder / 'tokenizer.json'))
    named = {'pad_token': '<pad>', 'eos_token': '<end>', 'chat_template': TEMPLATE}
    (folder / 'tokenizer_config.json').write_text(json.dumps(named))
    return str(folder)


def write_colors(path: pathlib.Path) -> str:
    """Writes a question and its answer for each thing."""
    rows = [
        {'prompt': ASKED.format(thing), 'completion': f' {color}'}
        for thing, color in COLORS.items()
    ]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)
