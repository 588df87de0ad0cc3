"""What the devices of a mesh send each other in a step of a decoder, against counts by hand."""

import jax
import numpy as np
import optax
import pytest
import quick
from cases import first_everywhere
from jax.sharding import AxisType
from zoo import ids

import peftjax as pj
from peftjax import _paths, losses, models

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason='needs eight devices')

ROWS, LENGTH, WIDTH, INNER, LAYERS, VOCABULARY, RANK = 8, 768, 32, 64, 3, 128, 2
CONFIG = models.read_decoder_config(
    {
        'model_type': 'llama', 'vocab_size': VOCABULARY, 'hidden_size': WIDTH,
        'num_hidden_layers': LAYERS, 'num_attention_heads': 8, 'num_key_value_heads': 8,
        'intermediate_size': INNER,
    }
)  # fmt: skip
MODEL = models.Decoder(CONFIG)
LINEARS = pj.Lora(rank=RANK, target=models.linears(CONFIG))
IDS = ids(0, VOCABULARY, ROWS, LENGTH)
ACTIVATION = 4 * ROWS * LENGTH * WIDTH
"""Bytes of the residual stream, all rows."""


def mesh_of(**axes):
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


def loss_of(peft):
    """The next-token loss, fused with the head: three chunks of 256 tokens on each device."""

    def mean(params, ids):
        hidden = MODEL.apply_fn(params, ids, method='hidden')
        weight = MODEL.head_weight(params).weight
        return losses.next_token_loss(hidden, weight, losses.next_tokens(ids)).mean

    forward = peft.wrap(mean)
    return lambda params, phi, ids, key: forward(params, phi, ids)


def received(**axes):
    """The plan of a step, shapes of theta by path and of phi, and which of phi are split."""
    mesh = mesh_of(**axes)
    at = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(1), IDS)['params']
    where = models.decoder_sharding(CONFIG, mesh)
    placed = {path: at(x, where(path)) for path, x in _paths.leaves(shapes).items()}
    params = _paths.replace(shapes, placed)
    batch = at(IDS, pj.sharding.batch_sharding(mesh))
    peft = pj.attach(LINEARS, MODEL.apply_fn, params, batch)
    with jax.numpy_dtype_promotion('standard'):
        plan = pj.plan(peft, loss_of(peft), params, batch, tx=optax.adam(1e-3), tokens=IDS.size)
    phi = jax.eval_shape(peft.init, jax.random.key(0), params)
    split = jax.tree.map(lambda s: any(s.spec), peft.shardings(params))
    return plan, placed, phi, split


def nbytes(leaves):
    return 4 * sum(leaf.size for leaf in leaves)


def test_data_parallelism_sums_gradients_of_phi():
    plan, _, phi, _ = received(data=8)
    assert set(plan.received) == {'all-reduce'}
    assert 0 <= plan.received['all-reduce'] - nbytes(jax.tree.leaves(phi)) <= 64  # and the loss


def test_fsdp_gathers_each_layer_forward_and_backward_and_the_head_once():
    plan, params, phi, split = received(fsdp=8)
    layers = nbytes(x for path, x in params.items() if '/layers/' in path and 'norm' not in path)
    factors = nbytes(
        x for x, s in zip(jax.tree.leaves(phi), jax.tree.leaves(split), strict=True) if s
    )
    edges = [nbytes([x]) for path, x in params.items() if 'lm_head' in path or 'embed' in path]
    assert len(edges) == 2
    assert plan.received['all-gather'] == 2 * (layers + factors) + sum(edges)
    # Gradients of phi, the loss.
    assert 0 <= plan.received['all-reduce'] - nbytes(jax.tree.leaves(phi)) <= 64


def test_tensor_parallelism_sums_activations():
    """Forward after two products of a layer, back after five; at the embedding and at the head."""
    plan, *_ = received(model=8)
    assert set(plan.received) == {'all-reduce'}
    tokens = 4 * ROWS * LENGTH
    # Where a product is summed, so is LoRA's in its rank; back through those two once more.
    factors = (7 + 2) * LAYERS * tokens * RANK
    softmax = 3 * tokens  # its greatest logit, its norm, the one of the target
    wanted = (7 * LAYERS + 2) * ACTIVATION + factors + softmax
    assert 0 <= plan.received['all-reduce'] - wanted <= 64


HEADS = {
    'frozen': LINEARS,
    'adapted': pj.Lora(rank=RANK, target='proj|lm_head'),
    'trained': pj.Trainable(target='lm_head'),
}


@pytest.mark.parametrize(
    ('method', 'quantized'),
    first_everywhere([*((name, False) for name in HEADS), ('frozen', True), ('adapted', True)]),
)
def test_the_loss_and_its_gradient_are_those_of_one_device(method, quantized):
    params, batch = MODEL.init(jax.random.key(1), IDS)['params'], IDS[:, :65]
    if quantized:
        params = pj.quantize(params, pj.INT8, target='lm_head')
    peft = pj.attach(HEADS[method], MODEL.apply_fn, params, batch)
    phi = peft.init(jax.random.key(2), params)
    phi = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(3), x.shape), phi)
    step = quick.jit(jax.value_and_grad(loss_of(peft), argnums=1))
    wanted = step(params, phi, batch, jax.random.key(0))
    mesh = mesh_of(fsdp=4, model=2)
    where = models.decoder_sharding(CONFIG, mesh)
    place = lambda x, s: jax.device_put(x, x.shardings(s) if isinstance(x, pj.Quantized) else s)
    placed = {path: place(x, where(path)) for path, x in _paths.leaves(params).items()}
    there = _paths.replace(params, placed)
    with jax.set_mesh(mesh):
        spread = jax.device_put(phi, peft.shardings(there))
        rows = jax.device_put(batch, pj.sharding.batch_sharding(mesh))
        found = step(there, spread, rows, jax.random.key(0))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
