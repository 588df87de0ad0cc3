"""`peftjax plan`, on the shapes of large models and on a tiny one."""

import json
import pathlib

import jax
import jax.numpy as jnp
import language
import pytest

import peftjax as pj
from peftjax import models

SHAPES = pathlib.Path(__file__).parent / 'shapes'
BATCH, LENGTH = 1, 64


@pytest.mark.parametrize(
    'name, layers, width, inner, parameters',
    [
        ('llama-3.1-8b', 32, 4096, 14336, 8_030_261_248),
        ('llama-3.1-70b', 80, 8192, 28672, 70_553_706_496),
        ('llama-3.1-405b', 126, 16384, 53248, 405_853_388_800),
    ],
)
def test_parameters_and_phi_by_hand(name, layers, width, inner, parameters):
    config = models.read_decoder_config(json.loads((SHAPES / f'{name}.json').read_text()))
    model, ids = models.Decoder(config), jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)['params']
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
    method = pj.Lora(target=models.linears(config), rank=16)
    peft = pj.attach(method, model.apply_fn, params, ids)
    kept = 8 * 128  # of keys and of values
    sides = 2 * (width + width) + 2 * (width + kept) + 3 * (width + inner)
    assert peft.count() == layers * 16 * sides


def rows_of(out):
    """The printed plan, below the table of sites."""
    rows = dict(line.split('  ', 1) for line in out.rpartition('\n\n')[2].splitlines())
    return {name.strip(): value.strip() for name, value in rows.items()}


def test_a_plan_of_eight_billion_parameters(peftjax):
    some = ('--model', SHAPES / 'llama-3.1-8b.json', '--batch', BATCH, '--length', LENGTH)
    ran = peftjax('plan', *some, '--remat', 'none', '--rank', 16)
    assert ran.code == 0
    rows = rows_of(ran.out)
    phi, embedding = 41_943_040, 128_256 * 4096
    products = 8_030_261_248 - embedding - 65 * 4096
    # Each product runs forward and back to its input; phi gets a gradient besides; six products
    # of attention, over all pairs.
    per_token = 4 * products + 6 * phi + 6 * 2 * LENGTH * 4096 * 32
    assert rows['FLOPs per token'] == f'{per_token:.4g}'
    assert rows['FLOPs of a step'] == f'{per_token * LENGTH:.4g}'
    assert rows['parameters'] == '8,030,261,248' and rows['trained'] == f'{phi:,} (0.522 %)'
    assert rows['bytes of theta'] == f'{2 * 8_030_261_248 / 1e9:.3g} GB'
    assert rows['bytes of phi'] == f'{4 * phi / 1e6:.3g} MB'
    assert rows['bytes of optimizer state'] == f'{8 * phi / 1e6:.3g} MB'
    size, unit = rows['temporaries of a step'].split()
    # Gradients of phi, activations, and no copy of the weights in another dtype.
    assert unit == 'GB' and 4 * phi / 1e9 < float(size) < 8


@pytest.mark.slow
def test_a_plan_of_a_folder_on_a_mesh(peftjax, tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(language.FIELDS))
    some = ('--model', tmp_path, '--batch', 4, '--length', 8, '--dtype', 'float32')
    more = ('--mesh', 'data=2,model=2', '--quantize', 'int8', '--method', 'prefix')
    ran = peftjax('plan', *some, *more)
    assert ran.code == 0 and '4 × cpu' in ran.out and 'PrefixTuning' in ran.out
    assert '32' in ran.out and 'on each device' in ran.out


@pytest.mark.slow
def test_a_plan_on_a_mesh_tells_what_each_device_holds_and_receives(peftjax, tmp_path):
    """As `docs/planning.md` reads it: layers are gathered twice in a step, the head once."""
    (tmp_path / 'config.json').write_text(json.dumps(language.FIELDS))
    some = ('--model', tmp_path, '--batch', 8, '--length', 8, '--dtype', 'float32')
    ran = peftjax('plan', *some, '--mesh', 'data=2,fsdp=4', '--rank', 1)
    assert ran.code == 0
    rows = rows_of(ran.out)
    head, norms = 40 * 32, 5 * 32
    layers = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    phi = 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    split = 2 * 7 * 32  # of phi, along `fsdp`: what goes along the residual stream
    held = phi - split + split // 4
    size = lambda numbers: f'{4 * numbers / 1e3:.3g} kB'
    theta = f'{size(2 * head + norms + layers)}, {size((2 * head + layers) // 4 + norms)}'
    assert rows['bytes of theta'] == f'{theta} on each device'
    assert rows['bytes of phi'] == f'{size(phi)}, {size(held)} on each device'
    gathered = 2 * (layers + split) + head + head  # the embedding too
    assert rows['received by all-gather'] == f'{size(gathered)} on each device'
    flops = float(rows['FLOPs of a step'].split(',')[0])
    each = float(rows['FLOPs of a step'].split(',')[1].removesuffix(' for each device'))
    assert abs(flops / 8 - each) < 1e-3 * each
    assert rows['compiled for'] == '8 × cpu'


def test_what_cannot_be_planned_is_said(peftjax, tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(language.FIELDS))
    (tmp_path / 'bert.json').write_text('{"model_type": "bert"}')
    model = ('--model', tmp_path)
    cases = {
        ('--model', tmp_path / 'none'): 'no such folder or file',
        ('--model', tmp_path / 'bert.json'): "got 'bert'",
        (*model, '--method', 'lara'): "unknown method 'lara'. Methods for language models: lora",
        (*model, '--method', 'bitfit'): 'BitFit adapts sites of kind bias',
        (*model, '--target', 'nothing'): 'no site matches',
        (*model, '--method', 'prefix', '--rank', 3): '--rank is not for prefix; it is for lora',
        (*model, '--mesh', 'data=3'): 'multiple of 3',
        (*model, '--mesh', 'data=16', '--batch', 16): 'a mesh of 16 devices is wanted',
        (*model, '--mesh', 'tensor=2'): 'axes among data, fsdp and model',
        (*model, '--mesh', 'data=0'): 'whole number from 1 up',
        (*model, '--quantize', 'fp4'): 'invalid choice',
        (*model, '--embeddings'): 'add --quantize nf4',
    }
    for arguments, reason in cases.items():
        ran = peftjax('plan', *arguments)
        assert ran.code == 2 and reason in ran.err, (arguments, ran)
