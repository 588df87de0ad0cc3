"""Outputs of transformers' PyTorch, stored once by make_golden.py: for those without torch."""

import jax
import numpy as np
import pytest

from peftjax.models import load_encoder

CASES = [
    ('bert', None, 'hidden'),
    ('bert', 'pooler', 'pooled'),
    ('bert', 'classifier', 'logits'),
    ('bert', 'mean', 'mean'),
    ('roberta', None, 'hidden'),
    ('roberta', 'classifier', 'logits'),
]


def without_pooler(golden):
    """The weights of a model whose classifier is one over the mean of the tokens."""
    return {name: value for name, value in golden.weights.items() if 'pooler' not in name}


@pytest.mark.parametrize('scan_layers', [True, False], ids=['scanned', 'unrolled'])
@pytest.mark.parametrize(('family', 'head', 'output'), CASES)
def test_outputs_are_those_of_pytorch(family, head, output, scan_layers, request, tmp_path):
    golden = request.getfixturevalue(family)
    weights = without_pooler(golden) if head == 'mean' else None
    loaded = load_encoder(golden.write(tmp_path, weights), head, scan_layers=scan_layers)
    method = 'pooled' if head == 'pooler' else '__call__'
    out = jax.jit(lambda p, kw: loaded.model.apply_fn(p, method=method, **kw))(
        loaded.params, golden.inputs
    )
    np.testing.assert_allclose(out, golden.outputs[output], rtol=1e-5, atol=1e-5)
    assert loaded.fresh == ()


@pytest.mark.parametrize('attention', ['fused', 'plain'])
def test_explicit_positions_and_no_mask(bert, tmp_path, attention):
    loaded = load_encoder(bert.write(tmp_path), attention=attention)
    ids = bert.inputs['input_ids']
    implicit = loaded.model.apply_fn(loaded.params, ids)
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).astype(np.int32)
    explicit = loaded.model.apply_fn(
        loaded.params, ids, np.ones_like(ids), np.zeros_like(ids), positions
    )
    np.testing.assert_allclose(implicit, explicit, rtol=1e-6, atol=1e-6)
    shifted = loaded.model.apply_fn(loaded.params, ids, position_ids=positions + 1)
    assert np.abs(shifted - implicit).max() > 0.01


def test_pool_mask_chooses_the_tokens_of_the_mean_only(bert, tmp_path):
    loaded = load_encoder(bert.write(tmp_path, without_pooler(bert)), 'mean')
    hidden = load_encoder(bert.write(tmp_path))
    ids, mask = bert.inputs['input_ids'], bert.inputs['attention_mask']
    first = np.zeros_like(mask)
    first[:, 3] = 1
    logits = loaded.model.apply_fn(loaded.params, ids, mask, pool_mask=first)
    vector = hidden.model.apply_fn(hidden.params, ids, mask)[:, 3]
    head = loaded.params['classifier']
    np.testing.assert_allclose(logits, vector @ head['kernel'] + head['bias'], atol=1e-5)
