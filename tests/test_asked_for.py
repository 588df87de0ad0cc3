"""What the configuration of an adapter asks for is used, listed or refused."""

import jax
import numpy as np
import pytest
from hf_case import attached, edit, edit_tensors, load, params

import peftjax as pj


@pytest.fixture
def folder(tmp_path):
    return pj.hf.save_adapter(tmp_path, *attached(), name='x')


# Biases -------------------------------------------------------------------------------------------

MODULES = [f'h.{layer}.{name}' for layer in (0, 1) for name in ('up', 'down')]


def of_modules(end, value):
    """One tensor for each adapted module."""
    names = (f'base_model.model.{module}.{end}' for module in MODULES)
    return {name: np.full(4, value + i, np.float32) for i, name in enumerate(names)}


@pytest.mark.parametrize('which', ['lora_only', 'all'])
def test_a_bias_of_the_pair_is_added_to_the_one_that_was_trained(folder, which):
    edit(folder, lora_bias=True, bias=which)
    edit_tensors(
        folder, lambda t: t | of_modules('lora_B.bias', 2) | of_modules('base_layer.bias', 100)
    )
    loaded = load(folder, jax.eval_shape(params))
    biases = [loaded.phi['saved'][f'{m.replace(".", "/")}/bias']['value'] for m in MODULES]
    for i, bias in enumerate(biases):
        np.testing.assert_allclose(bias, 100 + i + 1.5 * (2 + i))


def test_a_bias_of_the_pair_is_added_to_that_of_the_base(folder):
    edit(folder, lora_bias=True)
    edit_tensors(folder, lambda t: t | of_modules('lora_B.bias', 2))
    found = load(folder).phi['saved']['h/0/up/bias']['value']
    np.testing.assert_allclose(found, params()['h']['0']['up']['bias'] + 3, rtol=1e-6)


def test_a_bias_of_the_pair_that_is_missing(folder):
    edit(folder, lora_bias=True, bias='lora_only')
    edit_tensors(folder, lambda t: t | of_modules('base_layer.bias', 100))
    with pytest.raises(ValueError, match="lora_B.bias for every module.*'h.0.up.lora_B.bias'"):
        load(folder)
