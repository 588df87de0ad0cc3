"""Names inside of a block, dtypes, dropout, and derivatives of the fused forms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax.models import SAVED, Compute, Encoder, EncoderConfig, SequenceClassifier, mean_pool

CONFIG = EncoderConfig(
    model_type='bert',
    vocab_size=20,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=16,
    max_position_embeddings=10,
    initializer_range=0.3,
)
IDS = jnp.array([[3, 4, 5, 6, 7], [8, 9, 3, 0, 0]], jnp.int32)
MASK = (IDS != 0).astype(jnp.int32)
BLOCK_NAMES = {
    'query': (2, 5, 3, 4),
    'key': (2, 5, 3, 4),
    'value': (2, 5, 3, 4),
    'attention_output': (2, 5, 12),
    'attention_residual': (2, 5, 12),
    'up': (2, 5, 16),
    'mlp_output': (2, 5, 12),
    'mlp_residual': (2, 5, 12),
}


@functools.cache
def build(compute=Compute(), config=CONFIG):  # noqa: B008 (frozen)
    model = SequenceClassifier(config, compute, 'mean')
    params = jax.jit(model.init)(jax.random.key(0), IDS)['params']
    return model, params


def named(jaxpr):
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == 'name':
            found.append((eqn.params['name'], eqn.outvars[0].aval.shape))
        elif 'remat' in eqn.primitive.name:
            found += named(eqn.params['jaxpr'])
    return found


@pytest.mark.slow
@pytest.mark.parametrize('family', ['bert', 'roberta'])
def test_the_names_of_a_block_share_one_scope(family):
    config = dataclasses.replace(CONFIG, model_type=family)
    model, params = build(config=config)
    outer = jax.make_jaxpr(model.apply_fn)(params, IDS, MASK).jaxpr
    assert named(outer) == [('embeddings', (2, 5, 12))]
    [scan] = [eqn for eqn in outer.eqns if eqn.primitive.name == 'scan']
    assert named(scan.params['jaxpr'].jaxpr) == list(BLOCK_NAMES.items())

    model, params = build(Compute(scan_layers=False), config)
    flat = jax.make_jaxpr(model.apply_fn)(params, IDS, MASK).jaxpr
    assert named(flat) == [('embeddings', (2, 5, 12)), *BLOCK_NAMES.items(), *BLOCK_NAMES.items()]


def test_scanned_and_unrolled_are_one_model():
    scanned, params = build()
    stack = params['bert']['encoder']['layer']
    layers = {str(i): jax.tree.map(lambda x, i=i: x[i], stack) for i in range(2)}
    body = params['bert'] | {'encoder': {'layer': layers}}
    unrolled = SequenceClassifier(CONFIG, Compute(scan_layers=False), 'mean')
    a = scanned.apply_fn(params, IDS, MASK)
    b = unrolled.apply_fn(params | {'bert': body}, IDS, MASK)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('scan_layers', [True, False])
@pytest.mark.parametrize('save', [SAVED, ('query', 'attention_residual')])
def test_saving_names_changes_no_gradient(scan_layers, save):
    plain, params = build(Compute(scan_layers=scan_layers, save=None))
    saving, _ = build(Compute(scan_layers=scan_layers, save=save))
    how = dict(deterministic=False, rngs={'dropout': jax.random.key(1)})
    loss = lambda model: lambda p: (model.apply_fn(p, IDS, MASK, **how) ** 2).sum()
    a, b = (jax.jit(jax.grad(loss(model)))(params) for model in (plain, saving))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


def test_a_scan_keeps_the_saved_names_and_no_more():
    """Beside the sliced inputs of a block: its residual stream, and the random bits of dropout."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=7)
    model, params = build(Compute(save=SAVED), config)
    loss = lambda p: model.apply_fn(p, IDS, MASK).sum()
    jaxpr = jax.make_jaxpr(jax.grad(loss))(params).jaxpr
    forward = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == 'scan')
    kept = sorted(v.aval.shape for v in forward.outvars if v.aval.shape[:2] == (7, 2))
    names = [BLOCK_NAMES[name] for name in SAVED if name in BLOCK_NAMES]
    assert kept == sorted((7, *shape) for shape in [*names, (2, 5, 12)])


def test_dropout_needs_an_rng_and_changes_the_output():
    model, params = build()
    quiet = model.apply_fn(params, IDS, MASK)
    apply = jax.jit(
        lambda key: model.apply_fn(params, IDS, MASK, deterministic=False, rngs={'dropout': key})
    )
    run = lambda seed: apply(jax.random.key(seed))
    assert np.abs(run(0) - run(1)).max() > 1e-3
    np.testing.assert_array_equal(run(0), run(0))
    assert np.abs(run(0) - quiet).max() > 1e-3
    off = dataclasses.replace(CONFIG, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    still = SequenceClassifier(off, head='mean')
    np.testing.assert_array_equal(quiet, still.apply_fn(params, IDS, MASK, deterministic=False))


@pytest.mark.parametrize('attention', ['fused', 'plain'])
def test_bfloat16_keeps_float32_inside_softmax_and_norm(attention):
    exact, params = build()
    model = SequenceClassifier(
        CONFIG, Compute(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, attention=attention), 'mean'
    )
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    with jax.numpy_dtype_promotion('strict'):
        out = model.apply_fn(low, IDS, MASK)
        jaxpr = jax.make_jaxpr(jax.grad(lambda p: model.apply_fn(p, IDS, MASK).sum()))(low)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        out.astype(jnp.float32), exact.apply_fn(params, IDS, MASK), rtol=0.1, atol=0.1
    )
    kinds = {'exp': jnp.float32, 'rsqrt': jnp.float32}
    for primitive, dtype in dtypes(jaxpr.jaxpr):
        assert dtype == kinds.get(primitive, dtype), primitive


def dtypes(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, getattr(eqn.outvars[0].aval, 'dtype', None)
        for value in eqn.params.values():
            inner = getattr(value, 'jaxpr', value)
            if hasattr(inner, 'eqns'):
                yield from dtypes(inner)


def test_too_many_tokens_are_refused():
    model, params = build()
    with pytest.raises(ValueError, match='at most 10 tokens .*got 11'):
        model.apply_fn(params, jnp.ones((1, 11), jnp.int32))
    roberta = dataclasses.replace(CONFIG, model_type='roberta', pad_token_id=1)
    with pytest.raises(ValueError, match='at most 8 tokens .*got 9'):
        Encoder(roberta).init(jax.random.key(0), jnp.ones((1, 9), jnp.int32))


def test_an_id_outside_of_the_vocabulary_is_nan():
    model, params = build()
    out = model.apply_fn(params, IDS.at[0, 0].set(20), MASK)
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


def test_an_empty_row_of_the_mask_stays_finite():
    model, params = build()
    loss = lambda p: model.apply_fn(p, IDS, MASK.at[1].set(0)).sum()
    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, gradient)))
    assert not mean_pool(jnp.ones((1, 2, 3)), jnp.zeros((1, 2))).any()


def test_models_are_hashable_and_can_be_jitted():
    one, params = build()
    two, _ = build()
    assert hash(one) == hash(two) and one == two and one.apply_fn == one.apply_fn
    f = jax.jit(one.apply_fn)
    np.testing.assert_allclose(f(params, IDS), one.apply_fn(params, IDS), atol=1e-6)


def test_the_form_of_attention_is_checked():
    with pytest.raises(ValueError, match="attention must be one of .*'flash'"):
        Compute(attention='flash')


def test_the_hand_written_form_is_taken_where_it_was_measured(monkeypatch):
    def forms(**how):
        model = SequenceClassifier(CONFIG, Compute(**how))
        params = model.init(jax.random.key(0), IDS)['params']
        return 'custom_vjp' in str(jax.make_jaxpr(model.apply_fn)(params, IDS))

    assert forms() and forms(attention='fused') and not forms(attention='plain')
    monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
    assert not forms() and forms(attention='fused')
