"""Every method × every kind of apply function × the laws."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from blocks import MODELS, Model
from methods_under_test import CONVOLUTION, EVERYWHERE, EXPERTS, RAGGED

import peftjax as pj

ATTENTION = ('linen', 'plain', 'scanned', 'flax_nnx', 'equinox', 'encoder')
TABLES = {'experts': EXPERTS, 'ragged': RAGGED, 'convolution': CONVOLUTION}
OTHERS = [(method, model) for model, table in TABLES.items() for method in table]
HARD = [
    *((method, 'linen') for method in EVERYWHERE),
    *((method, ATTENTION[1 + i % 5]) for i, method in enumerate(EVERYWHERE)),
    *OTHERS,
]
"""Every method on the model with everything at once, and each on one of the others in turn."""

SMALL = [
    *((method, 'flax_nnx') for method in EVERYWHERE),
    *(('lora', model) for model in ATTENTION if model != 'flax_nnx'),
    *(pair for pair in OTHERS if pair[1] != 'ragged'),
]
"""Every method on a model of one block, and every model."""

SEAMS = [
    ('lora_patterns', 'flax_nnx'),
    ('lora', 'scanned'),
    ('lora', 'experts'),
    ('dora', 'convolution'),
    ('dora_over_lora', 'flax_nnx'),
    ('ia3', 'flax_nnx'),
    ('adapter_options', 'flax_nnx'),
    ('prompt', 'flax_nnx'),
    ('prefix_named_projected', 'flax_nnx'),
    ('norms', 'flax_nnx'),
]
"""Every seam. JAX has no vmap of `ragged_dot` yet, and no second derivative."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A method attached to a model."""

    model: Model
    method: Any
    peft: pj.Peft
    fresh: Any
    phi: Any
    forward: Any
    traces: list[None]


@functools.cache
def pair(method: str, model: str) -> Pair:
    """A pair, attached once for all laws; `phi` is away from the fresh one everywhere."""
    case, chosen = MODELS[model], TABLES.get(model, EVERYWHERE)[method]
    peft = pj.attach(chosen, case.fn, case.params, case.inputs)
    fresh = peft.init(jax.random.key(1), case.params)
    traces = []

    def counted(params, ids):
        traces.append(None)
        return case.fn(params, ids)

    return Pair(case, chosen, peft, fresh, away(fresh), quick.jit(peft.wrap(counted)), traces)


@functools.cache
def base(model: str) -> Any:
    """The outputs of the untouched model."""
    return jitted(model)(MODELS[model].params, MODELS[model].inputs)


@functools.cache
def jitted(model: str) -> Any:
    return quick.jit(MODELS[model].fn)


def away(phi: Any) -> Any:
    """The same tree with noise on every number."""
    draw = np.random.default_rng(7)
    noisy = lambda leaf: leaf + jnp.asarray(0.3 * draw.normal(size=leaf.shape), leaf.dtype)
    return jax.tree.map(noisy, phi)


def identity(method: Any) -> str:
    """What a method, or the weakest of a chain, claims."""
    claims = [part.identity for _, part in method.parts]
    return next(claim for claim in ('no', 'rounding', 'exact') if claim in claims)


def same(left: Any, right: Any) -> None:
    """Bit for bit."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(bits(a), bits(b))


def bits(array: Any) -> np.ndarray:
    return np.atleast_1d(np.asarray(array)).view(np.uint8)


def close(left: Any, right: Any, tolerance: float) -> None:
    """Equal up to a part of the largest value."""
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(jnp.abs(b).max() + 1e-3))


pairs = lambda chosen: pytest.mark.parametrize(('method', 'model'), chosen)
each_method = pytest.mark.parametrize('method', EVERYWHERE)


@pairs(HARD)
def test_a_fresh_phi_changes_nothing_where_it_is_claimed(method, model):
    p = pair(method, model)
    out = p.forward(p.model.params, p.fresh, p.model.inputs)
    match identity(p.method):
        case 'exact':
            same(out, base(model))
        case 'rounding':
            close(out, base(model), 1e-5)
        case 'no':
            assert out.shape == base(model).shape
            assert not jnp.allclose(out, base(model), atol=1e-4)


@pairs(HARD)
def test_the_merged_model_is_the_forward_or_merge_says_why_not(method, model):
    p = pair(method, model)
    if not all(part.mergeable for _, part in p.method.parts):
        with pytest.raises(ValueError, match='Keep phi'):
            p.peft.merge(p.model.params, p.phi)
        return
    merged = p.peft.merge(p.model.params, p.phi)
    same(merged, p.peft.merge(p.model.params, p.phi))
    assert jax.tree.map(_shaped, merged) == jax.tree.map(_shaped, p.model.params)
    out = jitted(model)(merged, p.model.inputs)
    close(p.forward(p.model.params, p.phi, p.model.inputs), out, 1e-5)
    assert not jnp.allclose(out, base(model), atol=1e-4)


def _shaped(leaf: Any) -> tuple[Any, ...]:
    return leaf.shape, leaf.dtype


@pairs(SMALL)
def test_only_phi_learns_and_all_of_it(method, model):
    p = pair(method, model)
    params, wanted = p.model.params, 0.9 * base(model)
    before = jax.tree.map(np.array, params)
    forward, tx = p.peft.wrap(p.model.fn), optax.adam(1e-2)

    @quick.jit
    def step(params, phi, state):
        loss = lambda phi: jnp.mean((forward(params, phi, p.model.inputs) - wanted) ** 2)
        value, grads = jax.value_and_grad(loss)(phi)
        with jax.numpy_dtype_promotion('standard'):  # of optax's counts
            updates, state = tx.update(grads, state)
        return optax.apply_updates(phi, updates), state, value, grads

    phi, state, losses = p.phi, tx.init(p.phi), []
    for _ in range(4):
        phi, state, loss, grads = step(params, phi, state)
        losses.append(loss)
        largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
        for path, grad in pj._paths.leaves(grads).items():
            # a softmax does not see what is added to all its keys
            if 'key/bias' not in path:
                assert jnp.abs(grad).max() > 1e-5 * largest, path
    assert losses[-1] < losses[0]
    same(jax.tree.map(np.array, params), before)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), phi, p.phi)
    assert all(jax.tree.leaves(moved)), moved


@pairs(HARD)
def test_the_second_call_does_not_trace_again(method, model):
    p = pair(method, model)
    p.forward(p.model.params, p.fresh, p.model.inputs)
    count = len(p.traces)
    p.forward(p.model.params, p.phi, (p.model.inputs + 1) % 7)
    assert len(p.traces) == count


@pairs(SEAMS)
def test_jit_makes_no_difference(method, model):
    p = pair(method, model)
    eager = p.peft.wrap(p.model.fn)(p.model.params, p.phi, p.model.inputs)
    close(eager, p.forward(p.model.params, p.phi, p.model.inputs), 2e-6)


@pairs(HARD)
def test_a_bfloat16_base_stays_bfloat16(method, model):
    p = pair(method, model)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p.model.params)
    ids = p.model.inputs
    peft = pj.attach(p.method, p.model.fn, half, ids)
    phi = jax.eval_shape(peft.init, jax.random.key(0), half)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(phi))
    forward = jax.make_jaxpr(peft.wrap(p.model.fn))(half, phi, ids)
    parts = [part for _, part in p.method.parts]
    room = sum(part.length for part in parts if part.virtual)
    untouched = jax.make_jaxpr(p.model.fn)(half, jnp.pad(ids, ((0, 0), (0, room))))
    assert [v.dtype for v in forward.out_avals] == [v.dtype for v in untouched.out_avals]
    more = Counter(promotions(forward)) - Counter(promotions(untouched))
    if any(getattr(part, 'source', '') for part in parts):
        # a later value that an adapter reads is computed twice, with what the model does on its way
        more = set(more) - set(promotions(untouched))
    if not any(getattr(part, 'norm', '') for part in parts):
        assert not more


def promotions(jaxpr: Any) -> Iterator[tuple[Any, ...]]:
    """Equations that turn something as large as a weight or an activation into float32."""
    for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
        inner = list(jex.jaxprs_in_params(eqn.params))
        for one in inner:
            yield from promotions(one)
        wide = any(
            v.aval.dtype == jnp.float32 and math.prod(v.aval.shape) >= 64 for v in eqn.outvars
        )
        narrow = any(getattr(v.aval, 'dtype', None) == jnp.bfloat16 for v in eqn.invars)
        if wide and narrow and not inner:
            yield eqn.primitive.name, *(v.aval.shape for v in eqn.outvars)


@pairs(HARD)
def test_phi_can_be_planned_without_arrays(method, model):
    p = pair(method, model)
    params = jax.eval_shape(lambda: p.model.params)
    peft = pj.attach(p.method, p.model.fn, params, jax.eval_shape(lambda: p.model.inputs))
    assert peft == p.peft and hash(peft) == hash(p.peft)
    phi = jax.eval_shape(peft.init, jax.random.key(0), params)
    assert jax.tree.map(_shaped, phi) == jax.tree.map(_shaped, p.fresh)
    assert peft.count() == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(phi))
    assert 'total' in str(peft)


@pairs(SEAMS)
def test_vmap_over_phi_is_a_loop(method, model):
    p = pair(method, model)
    params, ids = p.model.params, p.model.inputs
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), p.fresh, p.phi)
    forward = quick.jit(jax.vmap(p.peft.wrap(p.model.fn), in_axes=(None, 0, None)))
    loop = [p.forward(params, phi, ids) for phi in (p.fresh, p.phi)]
    close(forward(params, stack, ids), jnp.stack(loop), 1e-5)


@pairs(SEAMS)
def test_second_order_gradients_are_finite(method, model):
    p = pair(method, model)
    forward = p.peft.wrap(p.model.fn)

    @quick.jit
    def twice(phi):
        loss = lambda phi: jnp.mean(forward(p.model.params, phi, p.model.inputs) ** 2)
        inner = lambda phi: sum(jnp.sum(g * g) for g in jax.tree.leaves(jax.grad(loss)(phi)))
        return jax.grad(inner)(phi)

    grads = jax.tree.leaves(twice(p.phi))
    assert all(jnp.isfinite(g).all() for g in grads)
    assert any(g.any() for g in grads)


@pairs(SEAMS)
def test_one_seed_gives_one_phi(method, model):
    p = pair(method, model)
    same(p.peft.init(jax.random.key(1), p.model.params), p.fresh)
    under_jit = quick.jit(p.peft.init)(jax.random.key(1), p.model.params)
    close(under_jit, p.fresh, 1e-6)


@pytest.mark.parametrize('method', [name for name in EVERYWHERE if name != 'everything'])
def test_phi_of_a_path_does_not_depend_on_what_else_is_adapted(method):
    p = pair(method, 'plain')
    both = pj.chain(first=pj.Lora(rank=1, target='head/kernel'), second=p.method)
    peft = pj.attach(both, p.model.fn, p.model.params, p.model.inputs)
    same(peft.init(jax.random.key(1), p.model.params)['second'], p.fresh)


def test_twice_the_same_method_on_one_path_starts_from_two_phis():
    p = pair('lora', 'plain')
    peft = pj.attach(pj.chain(p.method, p.method), p.model.fn, p.model.params, p.model.inputs)
    phi = peft.init(jax.random.key(1), p.model.params)
    same(phi['lora'], p.fresh)
    first, second = (phi[name]['layers/0/query/kernel']['a'] for name in ('lora', 'lora_2'))
    assert not jnp.allclose(first, second)


@each_method
def test_a_method_is_a_value(method):
    chosen = EVERYWHERE[method]
    again = eval(repr(chosen), {**vars(pj)})
    assert again == chosen and hash(again) == hash(chosen)
    others = [other for name, other in EVERYWHERE.items() if name != method]
    assert chosen not in others


@each_method
def test_phi_is_a_plain_tree_of_arrays(method):
    phi = pair(method, 'linen').fresh
    leaves, structure = jax.tree.flatten(phi)
    same(jax.tree.unflatten(structure, leaves), phi)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    _only_dicts(phi)


def _only_dicts(tree: Any) -> None:
    if not isinstance(tree, jax.Array):
        assert type(tree) is dict and all(isinstance(key, str) for key in tree)
        for inner in tree.values():
            _only_dicts(inner)


@pairs(SEAMS)
def test_phi_may_be_bfloat16(method, model):
    p = pair(method, model)
    phi = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), p.phi)
    out = p.forward(p.model.params, phi, p.model.inputs)
    assert out.dtype == jnp.float32
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), phi)
    close(out, p.forward(p.model.params, wide, p.model.inputs), 0.1)


@each_method
def test_the_dtype_of_phi_is_a_field(method):
    p = pair(method, 'linen')
    fields = lambda part: {'dtype': 'bfloat16'} if hasattr(part, 'dtype') else {}
    parts = [dataclasses.replace(part, **fields(part)) for _, part in p.method.parts]
    peft = pj.attach(pj.chain(*parts), p.model.fn, p.model.params, p.model.inputs)
    phi = jax.eval_shape(peft.init, jax.random.key(1), p.model.params)
    for (name,), part in peft.method.parts:
        wanted = getattr(part, 'dtype', 'float32')
        assert {leaf.dtype.name for leaf in jax.tree.leaves(phi[name])} == {wanted}
    forward = peft.wrap(p.model.fn)
    assert jax.eval_shape(forward, p.model.params, phi, p.model.inputs).dtype == jnp.float32
    if all(part.mergeable for part in parts):
        merged = jax.eval_shape(peft.merge, p.model.params, phi)
        assert jax.tree.map(_shaped, merged) == jax.tree.map(_shaped, p.model.params)
