"""Writes golden/*.npz: tiny random models of transformers' PyTorch, their inputs and outputs.

Run once, with torch and transformers installed: `python tests/models/make_golden.py`.
"""

import json
import pathlib

import numpy as np

SIZES = dict(
    vocab_size=40,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    max_position_embeddings=16,
    num_labels=3,
    initializer_range=0.3,
)


def bert():
    import transformers

    config = transformers.BertConfig(**SIZES, type_vocab_size=2)
    return transformers.BertForSequenceClassification(config)


def roberta():
    import transformers

    config = transformers.RobertaConfig(**SIZES, type_vocab_size=1, layer_norm_eps=1e-5)
    return transformers.RobertaForSequenceClassification(config)


def inputs(config):
    """Three sequences: full, padded at the end, padded at the front."""
    import torch

    ids = torch.randint(3, config.vocab_size, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    mask[2, :3] = 0
    ids = torch.where(mask == 1, ids, config.pad_token_id)
    types = torch.randint(0, config.type_vocab_size, ids.shape)
    return {'input_ids': ids, 'attention_mask': mask, 'token_type_ids': types}


def write(name, model):
    import torch

    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.eval()
    given = inputs(model.config)
    with torch.no_grad():
        base = getattr(model, name)(**given)
        arrays = {
            'hidden': base.last_hidden_state,
            'logits': model(**given).logits,
            **{f'in/{key}': value.int() for key, value in given.items()},
            **{f'weights/{key}': value for key, value in model.state_dict().items()},
        }
        if base.pooler_output is not None:
            arrays['pooled'] = base.pooler_output
            mask = given['attention_mask'][..., None]
            mean = (base.last_hidden_state * mask).sum(1) / mask.sum(1)
            arrays['mean'] = model.classifier(mean)
    path = pathlib.Path(__file__).parent / 'golden' / f'{name}.npz'
    numbers = {key: value.numpy() for key, value in arrays.items()}
    np.savez_compressed(path, config=json.dumps(model.config.to_dict()), **numbers)
    print(path.name, path.stat().st_size, 'bytes')


if __name__ == '__main__':
    import torch

    torch.manual_seed(0)
    write('bert', bert())
    write('roberta', roberta())
