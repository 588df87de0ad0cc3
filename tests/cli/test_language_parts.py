"""The parts of a run on a language model: targets, losses, rates, watching."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import first_everywhere
from quick import jit

import peftjax as pj
from peftjax import data, models
from peftjax.cli._watch import Watch
from peftjax.cli.language import _fit, _recipes, _task
from peftjax.cli.language._recipes import RECIPES

SIZES = {
    'vocab_size': 64, 'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 4,
    'num_key_value_heads': 2, 'intermediate_size': 24,
}  # fmt: skip
GPT2 = {'vocab_size': 64, 'n_embd': 16, 'n_layer': 2, 'n_head': 4, 'n_positions': 64}
IDS = jax.ShapeDtypeStruct((2, 8), jnp.int32)


def task_of(family, **fields) -> _task.Task:
    """A model of shapes."""
    fields = (GPT2 if family == 'gpt2' else SIZES) | fields
    decoder = models.Decoder(models.read_decoder_config({'model_type': family, **fields}))
    params = jax.eval_shape(decoder.init, jax.random.key(0), IDS)['params']
    return _task.Task('', decoder, params, None, (1,), 0)


@pytest.mark.parametrize(
    ('family', 'fields', 'all_linears', 'two'),
    [
        ('llama', {}, 'q_proj k_proj v_proj o_proj gate_proj up_proj down_proj', 'q_proj v_proj'),
        ('phi3', {}, 'qkv_proj o_proj gate_up_proj down_proj', 'qkv_proj'),
        ('mixtral', {'num_local_experts': 2}, 'q_proj k_proj v_proj o_proj w1 w2 w3',
         'q_proj v_proj'),
        ('gpt2', {}, 'c_attn c_proj c_fc', 'c_attn'),
    ],
)  # fmt: skip
def test_targets_follow_the_names_of_the_model(family, fields, all_linears, two):
    task = task_of(family, **fields)
    sites = pj.sites(task.decoder.apply_fn, task.params, IDS)
    for target, expected in ((_recipes.linears, all_linears), (_recipes.attention, two)):
        chosen = pj.Lora(target=target(task.config)).select(sites)
        names = {site.path.split('/')[-2] for site in chosen}
        assert names == set(expected.split())
        assert all(site.stack and site.path.endswith('/kernel') for site in chosen)


@pytest.mark.parametrize('name', RECIPES)
def test_every_recipe_fits_a_model_that_has_what_it_adapts(name):
    task = task_of('gpt2')
    peft = task.attach(RECIPES[name].build(task.config))
    assert 0 < peft.count() <= sum(leaf.size for leaf in jax.tree.leaves(task.params))
    assert 'dense' not in str(peft)


@pytest.fixture(scope='module')
def tied() -> _task.Task:
    """A model with weights, a tied head and a soft cap."""
    task = task_of('gemma2', head_dim=4, sliding_window=4, final_logit_softcapping=5.0)
    params = jit(task.decoder.init)(jax.random.key(0), jnp.ones((1, 2), jnp.int32))['params']
    return dataclasses.replace(task, params=jax.tree.map(lambda x: 4 * x, params))


@pytest.mark.parametrize('name', first_everywhere(['lora', 'prompt', 'prefix', 'full']))
def test_the_loss_is_that_of_what_is_generated_from(tied, name):
    rng = np.random.default_rng(0)
    samples = [data.Sample(rng.integers(2, 64, n), np.arange(n) > n // 3) for n in (7, 9, 4)]
    lay = data.one_per_row if name in ('prompt', 'prefix') else data.pack
    rows = lay(samples, 12)
    batch = _task.arguments(rows.batch(range(len(rows)), len(rows)))
    peft = tied.attach(RECIPES[name].build(tied.config))
    phi = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape),
                       jax.jit(peft.init)(jax.random.key(1), tied.params))  # fmt: skip
    loss = jit(_task.fused(peft, tied))(tied.params, phi, batch)
    forward, total = jit(peft.wrap(tied.decoder.apply_fn)), 0.0
    for ids, learned in samples:
        padded, mask = (np.zeros((1, 12), np.int32) for _ in range(2))
        padded[0, -len(ids) :], mask[0, -len(ids) :] = ids, 1
        logits = forward(tied.params, phi, padded, attention_mask=mask)[0, -len(ids) : -1]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(ids[1:]))
        total += float(each[learned[1:]].sum())
    assert float(loss.count) == sum(learned[1:].sum() for _, learned in samples)
    np.testing.assert_allclose(float(loss.total), total, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['lora', 'prompt'])
def test_a_quantized_table_is_the_rounded_one_wherever_it_is_used(tied, name):
    """Looked up, multiplied with in the loss and in the head, and read when phi is made."""
    target = _task.quantized(tied.config, embeddings=True)
    small = dataclasses.replace(tied, params=pj.quantize(tied.params, pj.NF4, target=target))
    assert isinstance(small.params['model']['embed_tokens']['embedding'], pj.Quantized)
    wide = dataclasses.replace(tied, params=pj.dequantize(small.params))
    ids = np.random.default_rng(0).integers(2, 64, (2, 8)).astype(np.int32)
    batch = {'input_ids': ids, 'targets': np.roll(ids, -1, 1)}
    found = []
    for task in (small, wide):
        peft = task.attach(RECIPES[name].build(task.config))
        assert 'dense' not in str(peft)
        phi = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape),
                           peft.init(jax.random.key(1), task.params))  # fmt: skip
        loss = lambda phi, task=task, peft=peft: _task.fused(peft, task)(task.params, phi, batch)
        total, grads = jit(jax.value_and_grad(lambda phi, loss=loss: loss(phi).mean))(phi)
        forward = peft.wrap(task.decoder.apply_fn)
        said = pj.generate(forward, task.params, phi, jnp.asarray(ids),
                           init_cache=task.decoder.init_cache, length=4)  # fmt: skip
        found.append((phi, total, grads, said.tokens))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)


def test_no_step_holds_the_logits_of_all_tokens():
    task = task_of('llama', vocab_size=8192)
    batch = {name: jax.ShapeDtypeStruct((16, 128), jnp.int32) for name in
             ('input_ids', 'targets', 'position_ids', 'segment_ids')}  # fmt: skip
    peft = task.attach(RECIPES['lora-attention'].build(task.config))
    with jax.numpy_dtype_promotion('standard'):  # as optax's schedules want it
        fitter = _fit.Fitter(task, peft, settings())
    phi = jax.eval_shape(peft.init, jax.random.key(0), task.params)
    state = jax.eval_shape(lambda phi: pj.start(fitter._tx, phi, jax.random.key(0)), phi)
    with jax.numpy_dtype_promotion('standard'):
        compiled = fitter._step.prepare(task.params, state, batch)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * (16 * 128 * 8192 * 4)


def settings(**changes) -> _fit.Settings:
    plain = _fit.Settings(
        rate=1.0, steps=20, batch=4, length=8, pack=True, answer_only=False, warmup=0.2,
        decay='linear', weight_decay=0.0, dtype='float32', quantize=None,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


@pytest.mark.parametrize(
    ('decay', 'middle', 'last'), [('linear', 0.5, 1 / 16), ('cosine', 0.5, 0.01), ('none', 1, 1)]
)
def test_the_rate_rises_then_falls(decay, middle, last):
    with jax.numpy_dtype_promotion('standard'):
        rates = [float(_fit.schedule(settings(decay=decay))(step)) for step in range(20)]
        flat = [float(_fit.schedule(settings(decay=decay, warmup=0.0))(step)) for step in (0, 19)]
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1, 1], rtol=1e-5)
    np.testing.assert_allclose([rates[12], rates[19]], [middle, last], atol=0.01)
    assert flat[0] == 1 and (flat[1] < 0.1 or decay == 'none')


def test_a_loss_that_is_not_finite_ends_the_run():
    added = []
    add = lambda step, values: added.append((step, values['loss']))
    metrics = types.SimpleNamespace(add=add, rows=[])
    bar = types.SimpleNamespace(set_postfix=lambda *a, **k: None, update=lambda *a: None)
    watch = Watch('lora', np.array([0.1, 0.2, 0.2]), bar, metrics)  # pyright: ignore
    watch.begin(10)
    watch.begin(10)
    watch.loss(1, 2.0)
    with pytest.raises(ValueError, match=r'lora: .* nan at step 2. Lower .* \(now 0.2\)'):
        watch.loss(2, float('nan'))
    assert added == [(1, 2.0)] and watch.tokens == 10
