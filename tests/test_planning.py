"""Plans from shapes: counts by hand, bytes per device, and FLOPs against the compiler's."""

import jax
import jax.numpy as jnp
import optax
import pytest

import peftjax as pj
from peftjax import models
from peftjax._flops import flops

FIELDS = {
    'model_type': 'llama',
    'vocab_size': 512,
    'hidden_size': 128,
    'intermediate_size': 256,
    'num_hidden_layers': 3,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
}
IDS = jax.ShapeDtypeStruct((4, 64), jnp.int32)


def abstract(fields, scan=True):
    """A decoder and the shapes of its parameters."""
    config = models.read_decoder_config(fields)
    model = models.Decoder(config, models.Compute(scan_layers=scan, save=None))
    return model, jax.eval_shape(model.init, jax.random.key(0), IDS)['params']


def gradient(fields, method, scan):
    """The gradient of phi, traced."""
    model, params = abstract(fields, scan)
    peft = pj.attach(method, model.apply_fn, params, IDS)
    forward = peft.wrap(model.apply_fn)
    phi = jax.eval_shape(peft.init, jax.random.key(0), params)
    loss = lambda phi, params, ids: jnp.square(forward(params, phi, ids)).mean()
    return jax.jit(jax.grad(loss)).trace(phi, params, IDS)


def test_flops_of_unrolled_layers_are_those_that_the_compiler_counts():
    traced = gradient(FIELDS, pj.Lora(target='proj/kernel', rank=4), scan=False)
    compiled = traced.lower().compile().cost_analysis()['flops']
    assert 0.97 < flops(traced.jaxpr) / compiled < 1.0  # It counts elementwise operations too.


def test_scanned_layers_count_as_often_as_they_run():
    counts = [
        flops(gradient(FIELDS | {'num_hidden_layers': n}, pj.Trainable(target='.'), scan).jaxpr)
        for n, scan in ((3, True), (3, False), (6, True), (9, True))
    ]
    assert counts[0] == counts[1]
    assert counts[3] - counts[2] == counts[2] - counts[0] > 0


def test_flops_of_other_products():
    x, kernel = jnp.ones((1, 8, 8, 6)), jnp.ones((3, 3, 2, 12))
    conv = lambda x: jax.lax.conv_general_dilated(
        x, kernel, (1, 1), 'SAME', feature_group_count=3,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'))  # fmt: skip
    assert flops(jax.make_jaxpr(conv)(x)) == 2 * 8 * 8 * 12 * 3 * 3 * 2
    rows, experts, sizes = jnp.ones((10, 4)), jnp.ones((3, 4, 5)), jnp.array([2, 3, 5])
    total = lambda w, x: jax.lax.ragged_dot(x, w, sizes).sum()
    ragged = jax.make_jaxpr(jax.value_and_grad(total, (0, 1)))
    assert flops(ragged(experts, rows)) == 3 * 2 * 10 * 4 * 5
    both = lambda x: jax.lax.cond(x.sum() > 0, lambda: x @ x, lambda: x @ x @ x)
    assert flops(jax.make_jaxpr(both)(jnp.ones((3, 3)))) == 2 * 2 * 27


def test_products_on_parts_of_arrays_count_for_all_devices():
    mesh = jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    rows, every = (jax.sharding.PartitionSpec(*axes) for axes in (['data'], []))
    part = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, every), out_specs=rows)
    x, w = jnp.ones((4, 3)), jnp.ones((3, 5))
    assert flops(jax.make_jaxpr(part)(x, w)) == flops(jax.make_jaxpr(jnp.matmul)(x, w)) == 2 * 60


def test_what_leads_to_no_result_is_not_counted():
    w = jnp.ones((5, 4, 4))

    @jax.jit
    def inside(x, unused):
        return x @ x, unused @ unused

    def body(x, w):
        dead = w @ w @ w
        y, also_dead = inside(x, w)
        return y, (dead[:0], also_dead)

    fn = lambda x: jax.lax.scan(body, x, w)
    assert flops(jax.make_jaxpr(lambda x: fn(x)[0])(w[0])) == 5 * 2 * 64
    assert flops(jax.make_jaxpr(lambda x: (fn(x)[0], fn(x)[1][1]))(w[0])) == 3 * 5 * 2 * 64


def planned(model, params, ids):
    """A plan of LoRA on query, with a plain loss."""
    peft = pj.attach(pj.Lora(target='q_proj/kernel', rank=4), model.apply_fn, params, ids)
    forward = peft.wrap(model.apply_fn)
    loss_fn = lambda params, phi, ids, key: jnp.square(forward(params, phi, ids)).mean()
    return pj.plan(peft, loss_fn, params, ids, tx=optax.adam(1e-3), tokens=256)


def test_a_plan_counts_bytes_on_each_device():
    model, params = abstract(FIELDS)
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ('data', 'model'), axis_types=kinds)
    where = models.decoder_sharding(model.config, mesh)
    at = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    name = lambda keys: jax.tree_util.keystr(keys, simple=True, separator='/')
    placed = jax.tree_util.tree_map_with_path(lambda k, x: at(x, where(name(k))), params)
    with jax.numpy_dtype_promotion('standard'):
        one = planned(model, params, IDS)
        four = planned(model, placed, at(IDS, pj.sharding.batch_sharding(mesh)))
    norms = 4 * 128 * (2 * 3 + 1)
    matrices = 4 * (2 * 512 * 128 + 3 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256))
    trained = 3 * 2 * 4 * 128
    assert one.whole == (norms + matrices, 4 * trained, 8 * trained + 4)
    assert one.whole == one.device == four.whole
    there = 3 * (128 * 4 + 4 * 128 // 2)  # b is split as the outputs of its weight
    assert four.device == (norms + matrices // 2, 4 * there, 8 * there + 4)
    assert (one.devices, four.devices) == (1, 4) and one.flops == four.flops
    assert 0.2 < four.temporaries / one.temporaries < 0.6
    assert one.received == {} and set(four.received) >= {'all-reduce'}
    assert 'received by all-reduce' in str(four)
    assert (one.batch, four.batch) == (IDS.size * 4, IDS.size * 2)
    assert one.peak == sum(one.whole) + one.batch + one.temporaries
    assert 'on each device' in str(four) and 'on each device' not in str(one)


def test_a_plan_of_an_optimizer_that_keeps_a_key():
    params, x = {'kernel': jnp.ones((4, 4))}, jnp.ones((2, 4))
    peft = pj.attach(pj.Lora(target='kernel', rank=1), lambda p, x: x @ p['kernel'], params, x)
    loss_fn = lambda params, phi, x, key: (x @ params['kernel']).mean()
    tx = optax.noisy_sgd(1e-2, key=jax.random.key(0))
    with jax.numpy_dtype_promotion('standard'):  # of optax
        found = pj.plan(peft, loss_fn, params, x, tx=tx, tokens=2)
    assert found.whole.optimizer == 8 + 4
    for tokens, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match='tokens must be'):
            pj.plan(peft, loss_fn, params, x, tx=tx, tokens=tokens)


def test_a_plan_of_quantized_weights():
    model, params = abstract(FIELDS)
    small = pj.quantize(params, pj.INT8, target=models.linears(model.config))
    with jax.numpy_dtype_promotion('standard'):
        found = planned(model, small, IDS)
    assert found.params == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert found.whole.params == sum(leaf.size * leaf.dtype.itemsize
                                     for leaf in jax.tree.leaves(small))  # fmt: skip


@pytest.mark.parametrize(
    'family, count',
    [('gpt2', 4), ('phi3', 4), ('mixtral', 7)],
)
def test_linears_find_the_products_of_each_family(family, count):
    more = {'n_embd': 128, 'n_layer': 3, 'n_head': 4, 'n_positions': 64, 'num_local_experts': 4}
    model, params = abstract(FIELDS | more | {'model_type': family, 'pad_token_id': 0})
    sites = pj.sites(model.apply_fn, params, IDS)
    pattern = models.linears(model.config)
    method = pj.Lora(target=pattern, rank=2)
    found = [site for site in sites if pj._paths.matches(pattern, site.path)]
    assert len(found) == count and {site.kind for site in found} <= {'linear', 'expert'}
    assert pj.attach(method, model.apply_fn, params, IDS).count() > 0


def test_unknown_axes_and_parts_are_refused():
    config = models.read_decoder_config(FIELDS)
    with pytest.raises(ValueError, match="among .*'fsdp'.* got 'tensor'"):
        models.decoder_sharding(config, jax.make_mesh((1,), ('tensor',)))
    with pytest.raises(ValueError, match="got 'head'"):
        models.linears(config, ('head',))
