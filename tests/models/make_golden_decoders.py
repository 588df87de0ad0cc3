"""Writes golden/decoders/*.npz: what transformers' PyTorch computes with drawn weights.

Stored are the configuration, names and shapes of the tensors, inputs, logits and greedy tokens; the
weights are drawn again from their names. Run once, with torch and transformers installed:
`python tests/models/make_golden_decoders.py`.
"""

import json
import pathlib
import tempfile

import numpy as np
from drawn import draw
from safetensors.numpy import load_file, save_file
from torch_decoders import FAMILIES, make_inputs, make_model

GENERATED = 64


def drawn_model(folder, name, deviation):
    """The family's tiny model with drawn weights, by way of a folder, and its tensors' shapes."""
    import transformers

    make_model(name).save_pretrained(folder)
    file = folder / 'model.safetensors'
    shapes = {tensor: list(value.shape) for tensor, value in load_file(file).items()}
    save_file(draw(shapes, deviation), file, metadata={'format': 'pt'})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation='eager')
    return model.eval(), shapes


def write(name):
    import torch

    torch.manual_seed(0)
    deviation = 0.3 if 'gemma' in name else 0.6
    with tempfile.TemporaryDirectory() as root:
        folder = pathlib.Path(root)
        model, shapes = drawn_model(folder, name, deviation)
        config = json.loads((folder / 'config.json').read_text())
    given = make_inputs()
    with torch.no_grad():
        logits = model(**given).logits.numpy()
    model.generation_config.eos_token_id = None
    front = {k: given[k][[0, 2]] for k in ('input_ids', 'attention_mask')}
    tokens = model.generate(**front, max_new_tokens=GENERATED, do_sample=False, pad_token_id=0)
    path = pathlib.Path(__file__).parent / 'golden' / 'decoders' / f'{name}.npz'
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        path,
        facts=json.dumps({'config': config, 'shapes': shapes, 'deviation': deviation}),
        input_ids=given['input_ids'].numpy().astype(np.int32),
        attention_mask=given['attention_mask'].numpy().astype(np.int32),
        logits=logits,
        tokens=tokens[:, -GENERATED:].numpy().astype(np.int32),
    )
    print(path.name, path.stat().st_size, 'bytes,', len(tokens.unique()), 'different tokens')


if __name__ == '__main__':
    for family in FAMILIES:
        write(family)
