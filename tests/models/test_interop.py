"""Stored base models and outputs of the conformance cases, where that folder is beside us."""

import pathlib

import numpy as np
import pytest

from peftjax.models import load_encoder

INTEROP = pathlib.Path(__file__).parents[2].parent / 'shared' / 'interop'


@pytest.mark.parametrize(
    ('case', 'head'), [('lora_bert_seqcls', 'classifier'), ('ah_seq_bn_bert', None)]
)
@pytest.mark.parametrize('scan_layers', [True, False], ids=['scanned', 'unrolled'])
def test_base_output(case, head, scan_layers):
    folder = INTEROP / case
    if not folder.is_dir():
        pytest.skip(f'no stored case {case}')
    loaded = load_encoder(folder / 'base', head, scan_layers=scan_layers)
    with np.load(folder / 'io.npz') as io:
        out = loaded.model.apply_fn(loaded.params, io['input_ids'], io['attention_mask'])
        np.testing.assert_allclose(out, io['out_base'], rtol=1e-5, atol=1e-5)
