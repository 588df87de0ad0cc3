"""Names inside of a block, packed rows, the cache, recomputation, dtypes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

from peftjax.losses import next_token_loss
from peftjax.models import Compute, Decoder, read_decoder_config
from peftjax.models._load_decoder import saved_names

# Local and global layers, of different windows and rotations.
FIELDS = {
    'model_type': 'gemma3_text',
    'vocab_size': 30,
    'hidden_size': 16,
    'intermediate_size': 20,
    'num_hidden_layers': 3,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 6,
    'query_pre_attn_scalar': 9,
    'sliding_window': 3,
    'sliding_window_pattern': 2,
    'initializer_range': 0.3,
}
LLAMA = {k: v for k, v in FIELDS.items() if 'window' not in k and 'query' not in k} | {
    'model_type': 'llama'
}
IDS = jax.random.randint(jax.random.key(1), (2, 8), 3, 30)
BLOCK_NAMES = {
    'query': (2, 8, 4, 6),
    'key': (2, 8, 2, 6),
    'value': (2, 8, 2, 6),
    'context': (2, 8, 24),
    'attention_output': (2, 8, 16),
    'attention_residual': (2, 8, 16),
    'up': (2, 8, 20),
    'gate': (2, 8, 20),
    'mlp_output': (2, 8, 16),
    'mlp_residual': (2, 8, 16),
}


@functools.cache
def build(compute=Compute(), **changes):  # noqa: B008 (frozen)
    model = Decoder(read_decoder_config(FIELDS | changes), compute)
    return model, jit(model.init)(jax.random.key(0), IDS)['params']


def unrolled(params):
    stack = params['model']['layers']
    layers = {str(i): jax.tree.map(lambda x, i=i: x[i], stack) for i in range(3)}
    return params | {'model': params['model'] | {'layers': layers}}


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def named(jaxpr):
    return [
        (eqn.params['name'], eqn.outvars[0].aval.shape)
        for eqn in jaxpr.eqns
        if eqn.primitive.name == 'name'
    ]


def test_the_names_of_a_block_share_one_scope():
    model, params = build(Compute(save=None))
    outer = jax.make_jaxpr(model.apply_fn)(params, IDS).jaxpr
    assert named(outer) == [('embeddings', (2, 8, 16))]
    [scan] = [eqn for eqn in outer.eqns if eqn.primitive.name == 'scan']
    assert named(scan.params['jaxpr'].jaxpr) == list(BLOCK_NAMES.items())


def test_scanned_and_unrolled_are_one_model():
    model, params = build()
    flat = Decoder(model.config, Compute(scan_layers=False))
    a, b = jit(model.apply_fn)(params, IDS), jit(flat.apply_fn)(unrolled(params), IDS)
    close(a, b)


def test_windows_and_rotations_are_those_of_each_layer():
    model, params = build()
    assert model.config.layers == (0, 1, 0)
    assert [kind.window for kind in model.config.kinds] == [3, None]
    out = model.apply_fn(params, IDS)
    for changes in (
        {'sliding_window': 2},
        {'sliding_window_pattern': 3},
        {'rope_local_base_freq': 100.0},
        {'rope_scaling': {'rope_type': 'linear', 'factor': 4.0}},
    ):
        other, _ = build(**{k: v for k, v in changes.items() if k != 'rope_scaling'})
        if 'rope_scaling' in changes:
            other = Decoder(read_decoder_config(FIELDS | changes))
        assert np.abs(other.apply_fn(params, IDS) - out).max() > 1e-2


def test_the_program_does_not_grow_with_depth():
    def size(depth):
        model = Decoder(read_decoder_config(FIELDS | {'num_hidden_layers': depth}))
        params = jax.eval_shape(model.init, jax.random.key(0), IDS)['params']
        return len(jax.jit(model.apply_fn).lower(params, IDS).as_text())

    assert size(12) < 1.02 * size(3)


@pytest.mark.parametrize('model_type', ['gemma3_text', 'llama'])
def test_packed_texts_do_not_see_each_other(model_type):
    fields = FIELDS if model_type == 'gemma3_text' else LLAMA
    model = Decoder(read_decoder_config(fields))
    params = jit(model.init)(jax.random.key(0), IDS)['params']
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 2, 0]], jnp.int32)
    packed = jit(model.apply_fn)(params, IDS, segment_ids=segments)
    apply = jit(model.apply_fn)
    for row, start, stop in [(0, 0, 3), (0, 3, 8), (1, 0, 6), (1, 6, 7)]:
        alone = apply(params, IDS[row : row + 1, start:stop])
        close(packed[row, start:stop], alone[0])


def test_padding_on_either_side_changes_nothing():
    model, params = build()
    apply = jit(model.apply_fn)
    alone = apply(params, IDS[:1, :5])
    for ids, mask, real in [
        ([*IDS[0, :5], 0, 0], [1, 1, 1, 1, 1, 0, 0], slice(0, 5)),
        ([0, 0, *IDS[0, :5]], [0, 0, 1, 1, 1, 1, 1], slice(2, 7)),
        ([*IDS[0, :2], 0, 0, *IDS[0, 2:5]], [1, 1, 0, 0, 1, 1, 1], [0, 1, 4, 5, 6]),
    ]:
        out = apply(params, jnp.array(ids)[None], jnp.array(mask)[None])
        close(out[:, real], alone)


@pytest.mark.parametrize('scan_layers', [True, False], ids=['scanned', 'unrolled'])
def test_reading_with_a_cache_is_reading_at_once(scan_layers):
    model, params = build()
    whole = jit(model.apply_fn)(params, IDS)
    if not scan_layers:
        model, params = Decoder(model.config, Compute(scan_layers=False)), unrolled(params)
    traces = []

    @jit
    def read(params, ids, mask, cache):
        traces.append(ids.shape)
        return model.apply_fn(params, ids, mask, cache=cache)

    # Three tokens of the first row, padded at the end; four of the second, padded in front.
    ids = jnp.array([[*IDS[0, :3], 0, 0], [0, *IDS[1, :4]]])
    mask = jnp.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    logits, cache = read(params, ids, mask, model.init_cache(2, 9))
    close(logits[0, :3], whole[0, :3])
    close(logits[1, 1:], whole[1, :4])
    for step in range(4):
        token = jnp.stack([IDS[0, 3 + step], IDS[1, 4 + step]])[:, None]
        logits, cache = read(params, token, jnp.ones_like(token), cache)
        close(logits[:, 0], jnp.stack([whole[0, 3 + step], whole[1, 4 + step]]))
    assert int(cache.index) == 9 and len(traces) == 2
    logits, _ = read(params, token, jnp.ones_like(token), cache)
    assert np.isnan(logits).all(), 'there was no slot left'


def test_what_a_cache_cannot_hold_is_refused():
    model, params = build()
    cache = model.init_cache(2, 7)
    with pytest.raises(ValueError, match='a slot for every token: 8 > 7'):
        model.apply_fn(params, IDS, cache=cache)
    with pytest.raises(ValueError, match='packed rows, which are read without a cache'):
        model.apply_fn(params, IDS, segment_ids=IDS, cache=cache)


def test_equal_models_have_equal_empty_caches():
    model, _ = build()
    same = Decoder(dataclasses.replace(model.config))
    assert model.init_cache == same.init_cache and hash(model.init_cache) == hash(same.init_cache)
    assert model.init_cache != Decoder(model.config, Compute(dtype=jnp.bfloat16)).init_cache
    assert model.init_cache.positions is None
    assert Decoder(dataclasses.replace(model.config, positions=9)).init_cache.positions == 9


def test_positions_may_be_said():
    model, params = build()
    said = jnp.arange(8, dtype=jnp.int32)[None]
    close(model.apply_fn(params, IDS, position_ids=said), model.apply_fn(params, IDS))
    assert np.abs(model.apply_fn(params, IDS, position_ids=2 * said)[:, 1:]).max() > 0.1


# Recomputation -----------------------------------------------------------------------------------


def kept(depth, remat):
    """Bytes that the forward pass hands to the backward pass, and the values' names."""
    compute = Compute(save=saved_names(remat))
    model = Decoder(read_decoder_config(LLAMA | {'num_hidden_layers': depth}), compute)
    params = jax.eval_shape(model.init, jax.random.key(0), IDS)['params']

    def forward(params, ids):
        return jax.vjp(lambda p: model.apply_fn(p, ids, method='hidden'), params)[1]

    compiled = jit(forward).lower(params, IDS).compile()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return compiled.memory_analysis().output_size_in_bytes, held


def test_what_a_gradient_keeps_is_what_was_asked_for():
    grows = {}
    for remat in ('none', 'names', 'full'):
        (more, more_held), (less, less_held) = kept(4, remat), kept(2, remat)
        # Weights of the layers are handed on as they are.
        grows[remat] = (more - less - (more_held - less_held)) // 2
    shapes = [(2, 8, 16)]  # what comes into a layer
    assert grows['full'] == 4 * sum(map(np.prod, shapes))
    names = saved_names('names')
    assert names is not None
    shapes += [BLOCK_NAMES[name] for name in names]
    assert grows['names'] == 4 * sum(map(np.prod, shapes))
    assert grows['none'] > 2 * grows['names']


@pytest.mark.slow
@pytest.mark.parametrize('scan_layers', [True, False], ids=['scanned', 'unrolled'])
def test_recomputation_changes_no_gradient(scan_layers):
    plain, params = build()
    params = params if scan_layers else unrolled(params)
    gradients = []
    for remat in ('none', 'names', 'full'):
        compute = Compute(scan_layers=scan_layers, save=saved_names(remat))
        model = Decoder(plain.config, compute)
        gradients.append(jit(jax.grad(lambda p, m=model: (m.apply_fn(p, IDS) ** 2).mean()))(params))
    for other in gradients[1:]:
        jax.tree.map(lambda a, b: close(a, b, 1e-4), gradients[0], other)
    with pytest.raises(ValueError, match="remat must be one of .*'all'"):
        saved_names('all')


# Dtypes ------------------------------------------------------------------------------------------


def test_bfloat16_keeps_float32_inside_softmax_norms_and_logits():
    exact, params = build()
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    model = Decoder(exact.config, Compute(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    with jax.numpy_dtype_promotion('strict'):
        out = jit(model.apply_fn)(low, IDS)
        jaxpr = jax.make_jaxpr(jax.grad(lambda p: model.apply_fn(p, IDS).sum()))(low)
    assert out.dtype == jnp.float32
    assert model.apply_fn(low, IDS, method='hidden').dtype == jnp.bfloat16
    assert model.init_cache(2, 3).key.dtype == jnp.bfloat16
    close(out, exact.apply_fn(params, IDS), 0.15)
    kinds = {'exp': jnp.float32, 'rsqrt': jnp.float32, 'tanh': jnp.bfloat16}
    for primitive, dtype in dtypes(jaxpr.jaxpr):
        assert dtype == kinds.get(primitive, dtype), primitive


MIXTURE = LLAMA | {
    'model_type': 'qwen3_moe',
    'num_experts': 4,
    'num_experts_per_tok': 2,
    'moe_intermediate_size': 12,
}
GEMMA2 = {k: v for k, v in FIELDS.items() if k != 'sliding_window_pattern'} | {
    'model_type': 'gemma2'
}


@pytest.mark.parametrize('fields', [LLAMA, GEMMA2, MIXTURE], ids=lambda f: f['model_type'])
def test_a_bfloat16_model_multiplies_in_bfloat16(fields):
    compute = Compute(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    model = Decoder(read_decoder_config(fields), compute)
    params = jax.eval_shape(model.init, jax.random.key(0), IDS)['params']

    def loss(params, ids):
        head = model.head_weight(params)
        hidden = model.apply_fn(params, ids, method='hidden')
        return next_token_loss(hidden, head.weight, ids, soft_cap=head.soft_cap).mean

    jaxpr = jax.make_jaxpr(jax.grad(loss))(params, IDS).jaxpr
    products = [e for e in inside(jaxpr) if 'dot' in e.primitive.name]
    operands = [[v.aval.dtype for v in e.invars[:2]] for e in products]
    assert operands == [[jnp.bfloat16] * 2] * len(products)
    # Of each layer: seven products, two of attention; twice more each in the backward pass.
    assert len(products) >= 3 * 9


def inside(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, 'jaxpr', value)
            if hasattr(inner, 'eqns'):
                yield from inside(inner)


def dtypes(jaxpr):
    return [
        (e.primitive.name, getattr(e.outvars[0].aval, 'dtype', None))
        for e in inside(jaxpr)
        if e.outvars
    ]


def test_an_id_outside_of_the_vocabulary_is_nan():
    model, params = build()
    out = model.apply_fn(params, IDS.at[0, 7].set(30))
    assert np.isnan(out[0, 7]).all() and np.isfinite(out[1]).all()


def test_models_are_hashable_and_can_be_jitted():
    one, _ = build()
    two = Decoder(dataclasses.replace(one.config))
    assert hash(one) == hash(two) and one == two and one.apply_fn == one.apply_fn


def test_a_cache_is_read_in_double_precision_mode():
    model, params = build()
    whole = jit(model.apply_fn)(params, IDS)
    with jax.enable_x64(True):
        logits, cache = model.apply_fn(params, IDS[:, :4], cache=model.init_cache(2, 8))
        token, _ = model.apply_fn(params, IDS[:, 4:5], cache=cache)
    close(logits, whole[:, :4])
    close(token[:, 0], whole[:, 4])
