"""A quantized base: code books, leaves, and the forward over them."""

import dataclasses
import functools
import math
import re
from statistics import NormalDist
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
import test_meshes as meshes
from applies import APPLIES
from blocks import MODELS
from cases import first_everywhere
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from methods_under_test import CONVOLUTION, EVERYWHERE, EXPERTS, RAGGED
from quick import jit
from zoo import ids, normal

import peftjax as pj
from peftjax import _codes
from peftjax._paths import leaves

CODES = ('nf4', 'int4', 'int8')
each_code = pytest.mark.parametrize('code', CODES)


def small(code: str = 'nf4', double: bool = True) -> pj.Scheme:
    return pj.Scheme(code=code, block=4, double=double)


def same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def close(left: Any, right: Any, tolerance: float = 1e-5) -> None:
    """Equal up to a part of the largest value."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * (np.abs(other).max()))


# Codes --------------------------------------------------------------------------------------------


def test_the_code_book_is_made_of_the_quantiles_of_a_normal_number():
    """Eight levels below zero and eight above, evenly spaced in probability (appendix E)."""
    quantile = NormalDist().inv_cdf
    offset = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))
    above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.array(sorted([*below, 0.0, *above])) / max(above)
    # the published ones were found in float32, whose last bit of a probability near 0.97 is worth
    # 6e-8 / (density of 0.07 * largest level of 1.85) here
    np.testing.assert_allclose(_codes.NF4, levels, rtol=0, atol=6e-8 / (0.07 * 1.85))


def levels(code: str) -> np.ndarray:
    steps = {'int4': 7, 'int8': 127}
    book = _codes.NF4 if code == 'nf4' else np.arange(-steps[code], steps[code] + 1) / steps[code]
    return np.asarray(book, np.float32)


@each_code
@pytest.mark.parametrize('width', [64, 80, 129])
def test_each_number_becomes_the_nearest_level_of_its_block(code: str, width: int):
    w = np.asarray(normal(1, 3, width))
    leaf = pj.Scheme(code=code, double=False).quantize(jnp.asarray(w))
    blocks = [w[:, i : i + 64] for i in range(0, width, 64)]
    scales = np.stack([np.abs(block).max(-1) for block in blocks], -1)
    np.testing.assert_array_equal(leaf.scales, scales)
    scale = np.repeat(scales, 64, -1)[:, :width]
    nearest = np.abs((w / scale)[..., None] - levels(code)).argmin(-1)
    np.testing.assert_allclose(leaf.dequantize(), levels(code)[nearest] * scale, rtol=1e-6)


def test_two_codes_lie_in_a_byte_the_first_in_the_upper_half():
    leaf = pj.Scheme(code='nf4', double=False).quantize(jnp.array([[-1.0, 1.0, 0.0]]))
    np.testing.assert_array_equal(leaf.codes, [[0x0F, 0x70]])


@each_code
@pytest.mark.parametrize('double', [False, True])
def test_no_number_is_off_by_more_than_half_a_gap(code: str, double: bool):
    w = normal(2, 4, 2 * 64 * 256 + 17)
    leaf = pj.Scheme(code=code, double=double).quantize(w)
    scale = np.asarray(_codes.absmax(w, 64))
    if double:  # rounded up, by at most one step
        step = np.asarray(leaf.steps)[:, np.arange(scale.shape[1]) // 256]
        scale, exact = np.asarray(leaf.scales) * step, scale
        assert (scale >= exact * (1 - 1e-6)).all() and (scale <= exact + 1.001 * step).all()
    half = np.diff(levels(code)).max() / 2
    bound = np.repeat(scale, 64, -1)[:, : w.shape[1]] * half
    assert (np.abs(np.asarray(leaf.dequantize() - w)) <= bound * (1 + 1e-5)).all()


def test_errors_and_bytes_on_normal_weights():
    w = normal(3, 512, 2048)
    found = {}
    for name, scheme in (('nf4', pj.NF4), ('int4', pj.INT4), ('int8', pj.INT8)):
        leaf = scheme.quantize(w)
        error = jnp.linalg.norm(leaf.dequantize() - w) / jnp.linalg.norm(w)
        found[name] = float(error), 8 * leaf.nbytes / leaf.size
        assert leaf.nbytes == sum(part.nbytes for part in jax.tree.leaves(leaf))
    assert found['nf4'][0] < 0.095 < 0.105 < found['int4'][0] < 0.12
    assert found['int8'][0] < 0.0065
    # 32 blocks a row: 8 bits for each scale, 32 for the row
    assert found['nf4'][1] == found['int4'][1] == 4 + 8 / 64 + 32 / 2048
    assert found['int8'][1] == 8 + 8 / 64 + 32 / 2048


def test_zeros_stay_zeros_and_nan_is_not_hidden():
    w = jnp.zeros((2, 128)).at[1, 3].set(jnp.nan)
    for code in CODES:
        made = pj.Scheme(code=code).quantize(w).dequantize()
        assert not made[0].any() and jnp.isnan(made[1, :64]).all()


# Leaves -------------------------------------------------------------------------------------------


@each_code
def test_leading_axes_are_those_of_the_weight(code: str):
    w = normal(4, 2, 3, 5, 7)
    leaf = small(code).quantize(w.astype(jnp.bfloat16))
    assert (leaf.shape, leaf.ndim, leaf.size, leaf.dtype) == ((2, 3, 5, 7), 4, 210, jnp.bfloat16)
    assert leaf.dequantize().dtype == jnp.bfloat16
    sliced = jax.tree.map(lambda part: part[1, 2], leaf)
    same(sliced.dequantize(), leaf.dequantize()[1, 2])
    _, scanned = lax.scan(lambda c, leaf: (c, leaf.dequantize()), 0, leaf)
    same(scanned, leaf.dequantize())


def test_trees_are_quantized_by_path_also_without_arrays():
    params = {'up': {'kernel': normal(1, 6, 8), 'bias': normal(2, 8)}, 'head': normal(3, 8, 4)}
    quantized = pj.quantize(params, small(), target=('kernel', '^head'))
    found = {path: type(leaf) is pj.Quantized for path, leaf in leaves(quantized).items()}
    assert found == {'up/kernel': True, 'up/bias': False, 'head': True}
    shapes = jax.eval_shape(lambda: params)
    planned = pj.quantize(shapes, small(), target=('kernel', '^head'))
    traced = jax.eval_shape(lambda p: pj.quantize(p, small(), target=('kernel', '^head')), shapes)
    kinds = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), quantized)
    assert kinds == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), planned)
    assert kinds == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), traced)
    whole = jax.eval_shape(pj.dequantize, planned)
    assert jax.tree.map(jnp.shape, whole) == jax.tree.map(jnp.shape, params)


def test_what_cannot_be_quantized_is_an_error_with_its_path():
    params = {'w': jnp.ones((2, 4)), 'count': jnp.ones(3, jnp.int32), 'scale': jnp.ones(())}
    with pytest.raises(ValueError, match="no leaf matches target='kernel'. Nearest: .*'w'"):
        pj.quantize(params, pj.NF4, target='kernel')
    with pytest.raises(TypeError, match="'count' is int32"):
        pj.quantize(params, pj.NF4, target='count')
    with pytest.raises(ValueError, match=r"'scale' has shape \(\)"):
        pj.quantize(params, pj.NF4, target='scale')
    with pytest.raises(TypeError, match="'w' is quantized already"):
        pj.quantize(pj.quantize(params, pj.NF4, target='w'), pj.INT8, target='w')
    with pytest.raises(ValueError, match="code must be 'nf4', 'int4' or 'int8'; got 'fp4'"):
        pj.Scheme(code='fp4')
    with pytest.raises(ValueError, match='block must be even and positive; got 7'):
        pj.Scheme(block=7)


def llama_1b() -> dict[str, Any]:
    """The shapes of Llama-3.2-1B, from its config: heads 32 and 8 of width 64, a tied head."""
    width, inner, keys, layers, vocabulary = 2048, 8192, 512, 16, 128256
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.bfloat16)
    linear = lambda i, o: {'kernel': shape(layers, i, o)}
    return {
        'embed_tokens': {'embedding': shape(vocabulary, width)},
        'norm': {'scale': shape(width)},
        'layers': {
            'input_layernorm': {'scale': shape(layers, width)},
            'post_attention_layernorm': {'scale': shape(layers, width)},
            'q_proj': linear(width, width),
            'k_proj': linear(width, keys),
            'v_proj': linear(width, keys),
            'o_proj': linear(width, width),
            'gate_proj': linear(width, inner),
            'up_proj': linear(width, inner),
            'down_proj': linear(inner, width),
        },
    }


def test_a_model_of_1b_shrinks_to_a_quarter():
    """All linears, the tied head among them; norms stay as they are."""
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    shapes = llama_1b()
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 1_235_814_400
    share = lambda target: size(pj.quantize(shapes, pj.NF4, target=target)) / size(shapes)
    assert share('kernel|embedding') < 0.26
    assert 0.41 < share('kernel') < 0.42  # the table is a fifth of the model


# The forward --------------------------------------------------------------------------------------

ZOO = (
    'transposed', 'tied', 'index_static', 'index_traced', 'index_last', 'split_before',
    'dynamic_sliced_before', 'reshaped', 'reshaped_mixing', 'broadcast', 'cast_before', 'experts',
    'conv_grouped', 'lookup_vmapped', 'remat', 'scan_carry', 'scan_remat', 'scan_nested',
)  # fmt: skip


@pytest.mark.parametrize('name', ZOO)
def test_outputs_and_gradients_are_those_over_the_dequantized_weights(name: str):
    case = APPLIES[name]
    base = pj.quantize(case.params, small(CODES[len(name) % 3]), target=case.target)
    dense = pj.dequantize(base)
    peft = pj.attach(pj.Lora(rank=2, target=case.target), case.fn, base, *case.args, **case.kwargs)
    assert {way for _, ways in peft.served for way in ways} == set(case.served)
    phi = jax.tree.map(lambda a: a + 0.1, peft.init(jax.random.key(0), base))

    @jit
    def everything(params):
        out = lambda phi: case.adapted(peft, params, phi, case.x)
        score = lambda phi: sum(
            jnp.sin(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(out(phi))
        )
        alone = pj.quantized_apply(case.base)(params, case.x)
        return alone, out(phi), jax.grad(score)(phi)

    close(everything(base), everything(dense), case.tolerance)


LEAN = (
    '(lora|dora)(_all|_patterns|_embedding|_over_lora)|ia3|adapter_options|scaled_parallel|prompt|'
    'prefix|prefix_named_projected|bitfit|norms|everything|trained_lora_adapter'
)
"""Every method once, on lookups too."""

METHODS = [
    *((name, 'flax_nnx') for name in EVERYWHERE if re.fullmatch(LEAN, name)),
    ('lora', 'scanned'),
    ('dora', 'scanned'),
    ('lora', 'experts'),
    ('lora', 'ragged'),
    ('dora', 'convolution'),
]
TABLES = {'experts': EXPERTS, 'ragged': RAGGED, 'convolution': CONVOLUTION}
WEIGHTS = '(kernel|weight|embedding)$'


@functools.cache
def quantized(model: str) -> Any:
    return pj.quantize(MODELS[model].params, small(), target=WEIGHTS)


@pytest.mark.parametrize(('method', 'model'), first_everywhere(METHODS))
def test_every_method_over_a_quantized_base(method: str, model: str):
    """Identity, merge and gradient are those of the dequantized base."""
    case, chosen = MODELS[model], TABLES.get(model, EVERYWHERE)[method]
    base = quantized(model)
    dense = pj.dequantize(base)
    peft = pj.attach(chosen, case.fn, base, case.inputs)
    assert peft == pj.attach(chosen, case.fn, dense, case.inputs)
    fresh = peft.init(jax.random.key(1), base)
    close(fresh, peft.init(jax.random.key(1), dense))

    @jit
    def step(params, phi):
        def loss(phi):
            out = peft.wrap(case.fn)(params, phi, case.inputs)
            return jnp.sin(out).sum(), out

        grads, out = jax.grad(loss, has_aux=True)(phi)
        return out, grads, pj.quantized_apply(case.fn)(params, case.inputs)

    out, _, alone = step(base, fresh)
    claims = {part.identity for _, part in chosen.parts}
    if claims == {'exact'}:
        same(out, alone)
    draw = np.random.default_rng(7)
    away = lambda leaf: leaf + jnp.asarray(0.3 * draw.normal(size=leaf.shape), leaf.dtype)
    phi = jax.tree.map(away, fresh)
    close(step(base, phi), step(dense, phi))
    if all(part.mergeable for _, part in chosen.parts) and method not in ('bitfit', 'norms'):
        with pytest.raises(ValueError, match=r'is quantized .*Merge into pj.dequantize\(params\)'):
            peft.merge(base, phi)


DEPTH, WIDTH, INNER = 8, 64, 256
STACK = {
    'up': normal(1, DEPTH, WIDTH, INNER, fan=WIDTH),
    'down': normal(2, DEPTH, INNER, WIDTH, fan=INNER),
}
ROWS = normal(3, 4, WIDTH)


def stacked(params, x):
    layer = lambda x, w: (x + jnp.tanh(x @ w['up']) @ w['down'], None)
    return lax.scan(layer, x, params)[0]


def unrolled(params, x):
    for i in range(DEPTH):
        x = x + jnp.tanh(x @ params['up'][i]) @ params['down'][i]
    return x


def shapes(jaxpr: Any) -> set[tuple[int, ...]]:
    """The shapes of all floating results, inside and out."""
    found = set()
    for eqn in jaxpr.eqns:
        floats = (v for v in eqn.outvars if jnp.issubdtype(v.aval.dtype, jnp.floating))
        found |= {tuple(v.aval.shape) for v in floats}
        for inner in jex.jaxprs_in_params(eqn.params):
            found |= shapes(inner)
    return found


def scans(jaxpr: Any) -> list[Any]:
    found = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == 'scan']
    return found + [s for eqn in jaxpr.eqns for j in jex.jaxprs_in_params(eqn.params)
                    for s in scans(j)]  # fmt: skip


@pytest.mark.parametrize('fn', [stacked, unrolled])
@pytest.mark.parametrize('method', [pj.Lora(rank=2, target='.'), pj.Dora(rank=2, target='.')])
def test_one_layer_at_a_time_is_dequantized_and_none_is_kept(fn: Any, method: Any):
    base = pj.quantize(STACK, pj.NF4, target='.')
    peft = pj.attach(method, fn, base, ROWS)
    phi = peft.init(jax.random.key(0), base)
    step = jax.value_and_grad(lambda phi, base: jnp.sin(peft.wrap(fn)(base, phi, ROWS)).sum())
    jaxpr = jax.make_jaxpr(step)(phi, base).jaxpr
    wide = {s for s in shapes(jaxpr) if math.prod(s) >= DEPTH * WIDTH * INNER}
    assert not wide
    for eqn in scans(jaxpr):
        assert not any(sorted(v.aval.shape[-2:]) == [WIDTH, INNER] for v in eqn.outvars)
    if fn is unrolled:
        return  # XLA on CPUs makes all layers' slices at once, those of plain weights too
    one = WIDTH * INNER * 4
    used = jax.jit(step).lower(phi, base).compile().memory_analysis().temp_size_in_bytes
    # the activations of all layers, and the two weights of one
    assert used < 3.5 * one + DEPTH * 4 * ROWS.size * INNER // WIDTH * 8
    assert used < DEPTH * one


def test_a_lookup_dequantizes_the_rows_that_it_finds():
    table, tokens = {'t': normal(0, 50, 64)}, ids(1, 50, 2, 3)
    base = pj.quantize(table, pj.NF4, target='t')
    fn = lambda params, tokens: params['t'][tokens]
    forward = pj.quantized_apply(fn)
    assert (50, 64) not in shapes(jax.make_jaxpr(forward)(base, tokens).jaxpr)
    same(forward(base, tokens), fn(pj.dequantize(base), tokens))
    outside = jnp.array([3, 50, -1, 99])
    for how in ({}, {'mode': 'clip'}, {'fill_value': 2.0}, {'mode': 'wrap'}):
        fn = lambda params, i, how=how: jnp.take(params['t'], i, axis=0, **how)
        same(pj.quantized_apply(fn)(base, outside), fn(pj.dequantize(base), outside))


def test_what_touches_the_last_axis_meets_the_dense_weight():
    base = pj.quantize({'w': normal(0, 6, 12)}, small('int8'), target='w')
    dense, x = pj.dequantize(base), normal(1, 3, 6)
    for fn in (
        lambda p, x: x @ p['w'].astype(jnp.bfloat16).astype(jnp.float32),
        lambda p, x: lax.scan(lambda c, row: (c, row * 2), 0, p['w'].T)[1],
        lambda p, x: lax.scan(lambda c, w: (c, x @ w), 0, p['w'].reshape(6, 3, 4).swapaxes(0, 1))[
            1
        ],
        lambda p, x: x @ lax.reduce_precision(p['w'], 8, 7),
        lambda p, x: x @ p['w'][:, None, ::-1].reshape(6, 12),
        lambda p, x: jnp.einsum('bi,bio->bo', x, jnp.broadcast_to(p['w'], (3, 6, 12))),
        lambda p, x: (p['w'], p['w'].T @ p['w']),
    ):
        close(pj.quantized_apply(fn)(base, x), fn(dense, x), 1e-6)


def test_the_plan_tells_what_becomes_a_weight_too_early():
    base = pj.quantize({'w': normal(0, 2, 6, 12), 'v': normal(1, 12, 4)}, small(), target='.')

    def fn(p, x):
        w = p['w'].reshape(2, 6, 3, 4)
        x = lax.scan(
            lambda x, w: (x + jnp.einsum('bi,ihk->bhk', x, w).sum((1, 2))[:, None], 0), x, w
        )
        return jnp.concatenate([x[0], x[0]], 1) @ p['v']

    peft = pj.attach(pj.Lora(rank=2, target='w'), fn, base, normal(2, 3, 6))
    assert dict(peft.early) == {'w': ('enters reshape',)}
    assert 'dequantized before its use: w (enters reshape)' in str(peft)
    phi = jax.tree.map(lambda a: a + 0.1, peft.init(jax.random.key(0), base))
    x = normal(2, 3, 6)
    close(peft.wrap(fn)(base, phi, x), fn(peft.merge(pj.dequantize(base), phi), x))


def test_leaves_of_one_axis_may_be_quantized_too():
    params = {'w': normal(0, 6, 8), 'b': normal(1, 8), 'stack': normal(2, 3, 8)}
    base = pj.quantize(params, small('int8'), target='.')

    def fn(p, x):
        add = lambda x, b: (x + b[None], None)
        return lax.scan(add, x @ p['w'] + p['b'][None], p['stack'])[0]

    x = normal(3, 2, 6)
    peft = pj.attach(pj.Ia3(target='w'), fn, base, x)
    phi = jax.tree.map(lambda a: 2 * a, peft.init(jax.random.key(0), base))
    close(peft.wrap(fn)(base, phi, x), peft.wrap(fn)(pj.dequantize(base), phi, x))


def test_a_bfloat16_base_stays_bfloat16():
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), STACK)
    base, x = pj.quantize(half, pj.NF4, target='.'), ROWS.astype(jnp.bfloat16)
    peft = pj.attach(pj.Lora(rank=2, target='.'), stacked, base, x)
    phi = peft.init(jax.random.key(0), base)
    out = peft.wrap(stacked)(base, phi, x)
    assert out.dtype == jnp.bfloat16
    same(out, peft.wrap(stacked)(pj.dequantize(base), phi, x))


# Merging, saving, meshes --------------------------------------------------------------------------


def test_merging_is_explicit_and_tells_the_error():
    base = pj.quantize(STACK, pj.INT8, target='.')
    peft = pj.attach(pj.Lora(rank=2, target='.'), stacked, base, ROWS)
    phi = jax.tree.map(lambda a: a + 0.02, peft.init(jax.random.key(0), base))
    with pytest.raises(ValueError, match=r"'down' is quantized \(2 such leaves\)"):
        peft.merge(base, phi)
    merged = peft.merge(pj.dequantize(base), phi)
    close(stacked(merged, ROWS), peft.wrap(stacked)(base, phi, ROWS))
    again, error = pj.requantize(merged, like=base)
    assert jax.tree.structure(again) == jax.tree.structure(base)
    for path, leaf in leaves(pj.dequantize(again)).items():
        off = np.linalg.norm(leaf - leaves(merged)[path]) / np.linalg.norm(leaves(merged)[path])
        np.testing.assert_allclose(error[path], off, rtol=1e-4)
        assert 0.001 < error[path] < 0.01
    with pytest.raises(ValueError, match=r"'up' has shape \(8, 64, 256\) there and is missing"):
        pj.requantize({'down': merged['down']}, like=base)


def test_methods_on_other_leaves_merge_into_a_quantized_base():
    fn = lambda p, x: x @ p['w'] + p['b'][None]
    params = {'w': normal(0, 6, 8), 'b': normal(1, 8)}
    base = pj.quantize(params, small(), target='w')
    peft = pj.attach(pj.BitFit(), fn, base, normal(2, 3, 6))
    merged = peft.merge(base, {'b': {'value': params['b'] + 1}})
    same(merged['w'], base['w'])
    same(merged['b'], params['b'] + 1)


def test_a_trained_leaf_is_held_in_full_by_phi():
    base = pj.quantize(STACK, pj.NF4, target='.')
    peft = pj.attach(pj.Trainable(target='up'), stacked, base, ROWS)
    phi = peft.init(jax.random.key(0), base)
    same(phi['up']['value'], pj.dequantize(base)['up'])
    phi = jax.tree.map(lambda a: 2 * a, phi)
    twice = {**pj.dequantize(base), 'up': phi['up']['value']}
    close(peft.wrap(stacked)(base, phi, ROWS), stacked(twice, ROWS))


@each_code
def test_an_adapter_knows_the_quantized_base_again(code: str, tmp_path):
    base = pj.quantize(STACK, small(code), target='.')
    peft = pj.attach(pj.Lora(rank=2, target='.'), stacked, base, ROWS)
    pj.save(tmp_path / 'a', peft, peft.init(jax.random.key(0), base), params=base)
    for known in (base, pj.dequantize(base)):
        assert pj.load(tmp_path / 'a', params=known).peft == peft
    for other in (
        STACK,
        pj.quantize(STACK, small('int8' if code != 'int8' else 'nf4'), target='.'),
    ):
        with pytest.raises(ValueError, match='2 of 2 leaves hold other values'):
            pj.load(tmp_path / 'a', params=other)


@meshes.pytestmark
@meshes.kinds
def test_codes_lie_as_the_weights_and_nothing_is_gathered(kind: Any):
    mesh = meshes.mesh_of(kind)
    target = 'layers'
    local = pj.quantize(meshes.PARAMS, small(), target=target)
    peft = pj.attach(pj.Lora(rank=2, target='.*'), meshes.model, local, meshes.TOKENS)
    phi = jax.tree.map(lambda a: a + 0.1, peft.init(jax.random.key(0), local))
    step = jax.jit(jax.value_and_grad(meshes.loss(peft.wrap(meshes.model))))
    value, slope = step(phi, local, meshes.TOKENS)
    with jax.set_mesh(mesh):
        params, tokens = meshes.sharded(mesh)
        base = pj.quantize(params, small(), target=target)
        for path, leaf in leaves(base['layers']).items():
            for part in (leaf.codes, leaf.scales):
                want = NamedSharding(mesh, meshes.SPECS['layers'][path])
                assert part.sharding.is_equivalent_to(want, part.ndim)
        spread = jax.device_put(phi, NamedSharding(mesh, P()))
        found, gradient = step(spread, base, tokens)
        layer = lambda params, x: x @ params['up'][0]
        x = jax.device_put(normal(1, 2, meshes.WIDTH), NamedSharding(mesh, P('data', None)))
        compiled = jax.jit(pj.quantized_apply(layer)).lower({'up': base['layers']['up']}, x)
        text = compiled.compile().as_text()
    meshes.close(found, value)
    jax.tree.map(meshes.close, gradient, slope)
    assert 'all-gather' not in text
    same(jax.device_get(base['layers']), jax.device_get(local['layers']))


def test_second_derivatives_and_vmap_go_through():
    base = pj.quantize(jax.tree.map(lambda w: w[:2], STACK), pj.NF4, target='.')
    peft = pj.attach(pj.Lora(rank=2, target='.'), stacked, base, ROWS)
    phi = jax.tree.map(lambda a: a + 0.02, peft.init(jax.random.key(0), base))
    along = jax.tree.map(jnp.cos, phi)

    def twice(base):
        loss = lambda phi: jnp.sin(peft.wrap(stacked)(base, phi, ROWS)).sum()
        forward = jax.jvp(jax.grad(loss), (phi,), (along,))[1]
        slope = lambda phi: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, jax.grad(loss)(phi), along)))
        many = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), phi)
        return forward, jax.grad(slope)(phi), jax.vmap(loss)(many)

    close(jit(twice)(base), jit(twice)(pj.dequantize(base)), 1e-4)


def test_a_scheme_is_a_value():
    assert eval(repr(pj.NF4), vars(pj)) == pj.NF4 and hash(pj.NF4) == hash(pj.Scheme())
    assert dataclasses.replace(pj.NF4, code='int8') == pj.INT8
