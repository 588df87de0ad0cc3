"""A language model learns questions and answers, and says them.

What differs from 07: a decoder with a cache. Records become tokens, several examples to a row that
do not see each other; the loss is fused with the head, so that all logits are never held; and
`pj.generate` asks the tuned model. The base is random here; `models.load_decoder` reads a real one.
"""

import json
import pathlib
import tempfile

import jax
import numpy as np
import optax

import peftjax as pj
from peftjax import data, losses, models

FACTS = {
    'the sky': 'blue',
    'grass': 'green',
    'snow': 'white',
    'coal': 'black',
    'a lemon': 'yellow',
    'blood': 'red',
}
CONFIG = {'model_type': 'llama', 'vocab_size': 128, 'hidden_size': 64, 'num_hidden_layers': 2}
CONFIG |= {'num_attention_heads': 4, 'intermediate_size': 128, 'initializer_range': 0.3}


class Letters:
    """A tokenizer: a token for each letter; any of Hugging Face's would do."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens=False):
        return {'input_ids': [1] * add_special_tokens + [ord(letter) for letter in text]}


def rows_of(tokenizer, length):
    """The questions with their answers in rows, as if they came from a file."""
    with tempfile.TemporaryDirectory() as root:
        file = pathlib.Path(root) / 'train.jsonl'
        lines = [{'prompt': f'color of {k}?', 'completion': f' {v}'} for k, v in FACTS.items()]
        file.write_text('\n'.join(map(json.dumps, lines)))
        records = data.load_records(file)
    return data.pack(data.encode_records(tokenizer, records, max_tokens=length), length)


def ask(forward, params, phi):
    """What the model answers to all questions, padded in front to one length."""
    said = [[1, *map(ord, f'color of {thing}?')] for thing in FACTS]
    most = max(map(len, said))
    ids = np.array([[0] * (most - len(one)) + one for one in said], np.int32)
    found = pj.generate(
        forward, params, phi, ids, ids > 0, init_cache=model.init_cache, length=8, stop=(0,)
    )
    return [''.join(chr(i) for i in row if i).strip() for row in np.asarray(found.tokens)]


rows = rows_of(Letters(), length=64)
print(f'{len(FACTS)} examples in {len(rows)} rows')
model = models.Decoder(models.read_decoder_config(CONFIG))
batch = rows.batch([0], 1)
params = jax.jit(model.init)(jax.random.key(0), batch.input_ids)['params']

linears = r'layers/.*(q|k|v|o|gate|up|down)_proj/kernel'
peft = pj.attach(pj.Lora(rank=8, target=linears), model.apply_fn, params, batch.input_ids)
print(peft)


@peft.wrap
def loss(params, batch):
    ids, targets, positions, segments = batch
    how = {'position_ids': positions, 'segment_ids': segments}
    hidden = model.apply_fn(params, ids, method='hidden', **how)
    return losses.next_token_loss(hidden, model.head_weight(params).weight, targets).mean


tx = optax.adam(1e-2)
step = pj.train_step(lambda params, phi, batch, key: loss(params, phi, batch), tx)
state = pj.start(tx, jax.jit(peft.init)(jax.random.key(1), params), jax.random.key(2))
course = []
for batch in data.Batches(rows, 4, seed=0, epochs=60):
    state, value = step(params, state, batch)
    course.append(float(value))
print(f'loss: {course[0]:.3f} -> {course[-1]:.3f}')
assert course[-1] < 0.01 * course[0]

answers = ask(peft.wrap(model.apply_fn), params, state.phi)
print(', '.join(f'{thing}: {answer}' for thing, answer in zip(FACTS, answers, strict=True)))
assert answers == list(FACTS.values())

merged = peft.merge(params, state.phi)  # an ordinary checkpoint: no phi, no peftjax
assert ask(lambda params, phi, *a, **k: model.apply_fn(params, *a, **k), merged, None) == answers
print('merged: the same answers')
