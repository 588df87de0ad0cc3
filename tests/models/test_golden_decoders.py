"""Logits and tokens of transformers' PyTorch, stored by make_golden_decoders.py, without torch."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from drawn import draw
from quick import jit
from safetensors.numpy import save_file

from peftjax.models import load_decoder

FILES = sorted((pathlib.Path(__file__).parent / 'golden' / 'decoders').glob('*.npz'))


def test_every_family_is_there():
    assert len(FILES) == 10


@pytest.mark.slow
@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_logits_and_greedy_tokens_are_those_of_pytorch(path, tmp_path):
    with np.load(path) as file:
        golden = dict(file)
    facts = json.loads(str(golden['facts']))
    (tmp_path / 'config.json').write_text(json.dumps(facts['config']))
    save_file(draw(facts['shapes'], facts['deviation']), tmp_path / 'model.safetensors')
    model, params = load_decoder(tmp_path)[:2]
    step = jit(lambda params, ids, mask, cache: model.apply_fn(params, ids, mask, cache=cache))

    ids, mask, expected = golden['input_ids'], golden['attention_mask'], golden['tokens']
    count = expected.shape[1]
    cache = model.init_cache(len(ids), ids.shape[1] + count)
    logits, cache = step(params, ids, mask, cache)
    real = mask[..., None] == 1
    np.testing.assert_allclose(
        np.where(real, logits, 0), np.where(real, golden['logits'], 0), rtol=1e-4, atol=1e-4
    )

    found = []
    for _ in range(count):
        found.append(np.asarray(logits[:, -1].argmax(-1), np.int32)[:, None])
        logits, cache = step(params, found[-1], jnp.ones_like(found[-1]), cache)
    # Generation continues the last token: the row that is padded at its end has none.
    np.testing.assert_array_equal(np.concatenate(found, axis=1)[[0, 2]], expected)
    assert len(np.unique(expected)) > 2
