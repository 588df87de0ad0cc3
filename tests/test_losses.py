"""The loss that is fused with the head, against the formula on all logits at once."""

import functools
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from cases import first_everywhere
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from quick import jit
from zoo import ids, normal

import peftjax as pj
from peftjax.losses import next_token_loss, next_tokens

BATCH, TOKENS, WIDTH, VOCABULARY = 8, 13, 6, 20
HIDDEN, HEAD = normal(0, BATCH, TOKENS, WIDTH), normal(1, WIDTH, VOCABULARY)
TARGETS = jnp.where(ids(2, 3, BATCH, TOKENS) > 0, ids(3, VOCABULARY, BATCH, TOKENS), -100)
WEIGHTS, BIAS = jnp.abs(normal(4, BATCH, TOKENS)), normal(5, VOCABULARY)
OPTIONS = {
    'plain': {},
    'weights': {'weights': WEIGHTS},
    'bias': {'bias': BIAS},
    'soft cap': {'soft_cap': 2.0},
    'z-loss': {'z_loss': 0.1},
    'all': {'weights': WEIGHTS, 'bias': BIAS, 'soft_cap': 2.0, 'z_loss': 0.1},
}


def plain(hidden, head, targets, weights=None, bias=None, soft_cap=None, z_loss=0.0):
    """Sum and count by the formula."""
    logits = hidden @ head
    logits = logits if bias is None else logits + bias
    logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
    norm = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    weights = jnp.ones(targets.shape) if weights is None else weights
    weights = jnp.where(targets >= 0, weights, 0)
    return (weights * (norm - chosen + z_loss * norm**2)).sum(), weights.sum()


def close(got: Any, wanted: Any, tolerance: float = 2e-6) -> None:
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        scale = np.abs(np.asarray(other, np.float32)).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)


def mean(hidden, head, targets=TARGETS, **how):
    return next_token_loss(hidden, head, targets, chunk=32, **how).mean


def plain_mean(hidden, head, targets=TARGETS, **how):
    total, count = plain(hidden, head, targets, **how)
    return total / count


@pytest.mark.parametrize('name', OPTIONS)
def test_values_and_gradients_are_those_of_the_formula(name: str):
    floats = {key: value for key, value in OPTIONS[name].items() if isinstance(value, jax.Array)}
    other = {key: value for key, value in OPTIONS[name].items() if key not in floats}

    def fused(hidden, head, floats):
        loss = next_token_loss(hidden, head, TARGETS, chunk=24, **floats, **other)
        return loss.total, loss.count

    by_hand = lambda hidden, head, floats: plain(hidden, head, TARGETS, **floats, **other)
    both = lambda fn: jax.value_and_grad(fn, argnums=(0, 1, 2), has_aux=True)
    close(*(jit(both(fn))(HIDDEN, HEAD, floats) for fn in (fused, by_hand)))


@pytest.mark.parametrize('chunk', [1, 8, 30, 104, 1000])
def test_the_chunk_changes_nothing(chunk: int):
    fn = lambda hidden: next_token_loss(hidden, HEAD, TARGETS, chunk=chunk).mean
    close(jit(jax.value_and_grad(fn))(HIDDEN), jit(jax.value_and_grad(plain_mean))(HIDDEN, HEAD))


def test_totals_and_counts_of_parts_add_up():
    whole = next_token_loss(HIDDEN, HEAD, TARGETS)
    one = jit(lambda i: next_token_loss(HIDDEN[i], HEAD, TARGETS[i]))
    parts = [one(i) for i in range(BATCH)]
    total, count = (sum(part[i] for part in parts) for i in range(2))
    close((total, count), whole)
    assert int(count) == int((TARGETS >= 0).sum())


def test_nothing_to_learn_is_a_loss_of_zero_with_zero_gradients():
    value, grad = jax.value_and_grad(mean)(HIDDEN, HEAD, jnp.full_like(TARGETS, -100))
    assert value == 0 and not grad.any()


def test_what_lies_at_padding_has_no_say():
    real = (TARGETS >= 0)[..., None]
    broken = jnp.where(real, HIDDEN, jnp.nan)
    both = jit(jax.value_and_grad(mean, (0, 1)))
    close(both(broken, HEAD), both(HIDDEN, HEAD))


def test_a_target_beyond_the_vocabulary_is_not_taken_for_another():
    assert jnp.isnan(mean(HIDDEN, HEAD, TARGETS.at[0, 0].set(VOCABULARY)))


def dots(jaxpr: Any) -> list[tuple[Any, Any, Any]]:
    """Types of the operands and results of all dots, inside and out."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == 'dot_general':
            found.append((*(v.aval for v in eqn.invars), eqn.outvars[0].aval))
        for inner in jex.jaxprs_in_params(eqn.params):
            found += dots(inner)
    return found


def made_and_used(fn: Any, *args: Any) -> tuple[int, int]:
    """How many dots make an array of the head's shape, and how many take one of that size."""
    found = dots(jax.make_jaxpr(fn)(*args).jaxpr)
    size = WIDTH * VOCABULARY
    return sum(out.size == size for *_, out in found), sum(
        size in (left.size, right.size) for left, right, _ in found
    )


def test_a_frozen_head_takes_two_products_and_a_trained_one_three():
    grad = lambda which: jax.value_and_grad(mean, which)
    assert made_and_used(grad(0), HIDDEN, HEAD) == (0, 2)
    assert made_and_used(grad((0, 1)), HIDDEN, HEAD) == (1, 2)
    assert made_and_used(grad(1), HIDDEN, HEAD) == (1, 1)
    assert made_and_used(mean, HIDDEN, HEAD) == (0, 1)


LARGE = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 512, 128), (128, 4096))]
LARGE_TARGETS = jax.ShapeDtypeStruct((2, 512), jnp.int32)


def compiled(fn: Any, which: Any, **how: Any) -> Any:
    step = jax.value_and_grad(functools.partial(fn, **how), which)
    return jax.jit(step).lower(*LARGE, LARGE_TARGETS).compile()


def test_the_logits_are_never_held():
    loss = lambda *args, chunk=64: next_token_loss(*args, chunk=chunk).mean
    logits = 4 * LARGE_TARGETS.size * LARGE[1].shape[1]
    bytes_of = lambda program: program.memory_analysis().temp_size_in_bytes
    frozen, trained = (bytes_of(compiled(loss, which)) for which in (0, (0, 1)))
    assert bytes_of(compiled(plain_mean, 0)) > logits
    assert frozen < logits / 4
    assert trained - frozen <= 1.1 * 4 * LARGE[1].size  # the gradient of the head, once
    # one chunk: XLA counts the body of a loop once
    flops = compiled(loss, 0, chunk=10**6).cost_analysis()['flops']
    assert flops <= 1.05 * 2 * 2 * LARGE_TARGETS.size * LARGE[1].size
    assert flops < 0.7 * compiled(plain_mean, (0, 1)).cost_analysis()['flops']


def test_a_narrow_model_has_narrow_products_and_a_wide_loss():
    narrow = [array.astype(jnp.bfloat16) for array in (HIDDEN, HEAD, BIAS)]
    run = lambda hidden, head, bias: mean(hidden, head, bias=bias)
    both = jax.value_and_grad(run, (0, 1, 2))
    value, grads = jit(both)(*narrow)
    wide_value, wide_grads = jit(both)(*(array.astype(jnp.float32) for array in narrow))
    assert value.dtype == jnp.float32 and {g.dtype for g in grads} == {jnp.dtype('bfloat16')}
    close(value, wide_value)  # only the way back is rounded
    close(jax.tree.map(lambda g: g.astype(jnp.float32), grads), wide_grads, 1e-2)
    for left, right, _ in dots(jax.make_jaxpr(both)(*narrow).jaxpr):
        assert left.dtype == right.dtype == jnp.bfloat16


def test_gradients_of_gradients():
    def norm(fn):
        inner = jax.grad(fn, (0, 1))
        return lambda *args: sum((g**2).sum() for g in inner(*args))

    close(*(jit(jax.grad(norm(f), (0, 1)))(HIDDEN, HEAD) for f in (mean, plain_mean)), 1e-5)
    # the inner gradient alone does not ask for that of the head
    mixed = lambda fn: jax.grad(lambda h, w: (jax.grad(fn)(h, w) ** 2).sum(), 1)
    close(*(jit(mixed(f))(HIDDEN, HEAD) for f in (mean, plain_mean)), 1e-5)
    push = lambda fn: jit(lambda h: jax.jvp(lambda h: jax.grad(fn)(h, HEAD), (h,), (h,)))
    close(push(mean)(HIDDEN), push(plain_mean)(HIDDEN), 1e-5)


def test_forward_mode_is_refused():
    with pytest.raises(TypeError, match='forward-mode'):
        jax.jvp(lambda h: mean(h, HEAD), (HIDDEN,), (HIDDEN,))


def test_under_vmap_remat_and_scan():
    heads = jnp.stack([HEAD, 2 * HEAD])
    mapped = lambda fn: jit(jax.vmap(jax.grad(fn, (0, 1)), (None, 0)))(HIDDEN, heads)
    wanted = mapped(plain_mean)
    close(mapped(mean), wanted)
    summed = lambda h, w: jax.vmap(mean, (None, 0))(h, w).sum()
    scanned = lambda h, w: jax.lax.scan(
        lambda s, w: (s + jax.checkpoint(mean)(h, w), None), jnp.zeros(()), w
    )[0]
    for fn in (summed, scanned):
        close(jit(jax.grad(fn, (0, 1)))(HIDDEN, heads), (wanted[0].sum(0), wanted[1]))
    assert made_and_used(jax.grad(scanned), HIDDEN, heads)[0] == 0


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_the_batch_and_the_vocabulary_stay_where_they_are(kind: AxisType):
    mesh = jax.make_mesh((4, 2), ('data', 'model'), axis_types=(kind, kind))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    args = put(HIDDEN, 'data'), put(HEAD, None, 'model'), put(TARGETS, 'data')
    step = jax.value_and_grad(lambda h, w, y: mean(h, w, y), (0, 1))
    with jax.set_mesh(mesh):
        program = jax.jit(step).lower(*args).compile()
    value, (of_hidden, of_head) = program(*args)
    close((value, (of_hidden, of_head)), jit(step)(HIDDEN, HEAD, TARGETS))
    assert of_hidden.sharding.spec[0] == 'data' and of_head.sharding.spec[1] == 'model'
    assert not any(name in program.as_text() for name in ('all-gather(', 'all-to-all('))


MODEL = {
    'embed': normal(6, VOCABULARY, WIDTH),
    'up': {'kernel': normal(7, WIDTH, WIDTH)},
    'head': {'kernel': HEAD, 'bias': BIAS},
}
INPUTS = ids(8, VOCABULARY, BATCH, TOKENS)


def model_loss(loss: Any, tied: bool) -> Any:
    def fn(params, tokens, targets):
        hidden = jnp.tanh(params['embed'][tokens] @ params['up']['kernel'])
        if tied:
            return loss(hidden, params['embed'].T, targets)
        return loss(hidden, params['head']['kernel'], targets, bias=params['head']['bias'])

    return fn


def moved(phi: Any) -> Any:
    """Away from where half of the gradients vanish."""
    return jax.tree.map(lambda a: a + 0.3 * normal(9, *a.shape), phi)


ADAPTED = {
    'lora': (pj.Lora(rank=2, target='head/kernel|up'), False),
    'tied lora': (pj.Lora(rank=2, target='embed'), True),
    'dora': (pj.Dora(rank=2, target='head/kernel|up'), False),
    'tied dora': (pj.Dora(rank=2, target='embed'), True),
    'ia3': (pj.Ia3(target='head/kernel|up'), False),
    'adapter': (pj.Adapter(target='head/kernel'), False),
    'everything': (pj.Trainable(target='.'), False),
    'tied everything': (pj.Trainable(target='embed'), True),
    'both': (pj.chain(pj.Lora(rank=2, target='head/kernel'), pj.Ia3(target='head/kernel')), False),
}


@pytest.mark.parametrize('name', first_everywhere(ADAPTED))
def test_an_adapted_head_is_exact_and_served_where_it_is_used(name: str):
    method, tied = ADAPTED[name]
    fused, by_hand = model_loss(mean, tied), model_loss(plain_mean, tied)
    args = (INPUTS, TARGETS)
    peft = pj.attach(method, fused, MODEL, *args)
    assert 'dense' not in str(peft)
    phi = moved(peft.init(jax.random.key(0), MODEL))
    step = lambda fn: jax.value_and_grad(lambda phi: peft.wrap(fn)(MODEL, phi, *args))
    close(jit(step(fused))(phi), jit(step(by_hand))(phi), 1e-5)
    if 'lora' in name:
        made, used = made_and_used(step(fused), phi)
        assert (made, used) == (0, 2)
    twice = lambda fn: (
        lambda phi: sum(
            (g**2).sum()
            for g in jax.tree.leaves(jax.grad(lambda p: peft.wrap(fn)(MODEL, p, *args))(phi))
        )
    )
    close(*(jit(jax.grad(twice(f)))(phi) for f in (fused, by_hand)), 1e-4)


def test_an_adapted_head_under_vmap_over_phi_and_inside():
    fused, by_hand = model_loss(mean, False), model_loss(plain_mean, False)
    one_by_one = lambda params, tokens, targets: jax.vmap(fused, (None, 0, 0))(
        params, tokens[:, None], targets[:, None]
    )
    peft = pj.attach(pj.Lora(rank=2, target='head/kernel'), fused, MODEL, INPUTS, TARGETS)
    start = moved(peft.init(jax.random.key(0), MODEL))
    phis = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), start)
    grads = [
        jit(jax.vmap(jax.grad(lambda phi, f=f: peft.wrap(f)(MODEL, phi, INPUTS, TARGETS))))(phis)
        for f in (fused, by_hand)
    ]
    close(*grads, 1e-5)
    summed = lambda fn: jit(jax.grad(lambda phi: peft.wrap(fn)(MODEL, phi, INPUTS, TARGETS).sum()))
    row = lambda params, *row: by_hand(params, *(x[None] for x in row))
    plainly = jax.vmap(row, (None, 0, 0))
    close(summed(one_by_one)(start), summed(plainly)(start), 1e-5)


def test_targets_of_labels():
    labels = jnp.array([[-100, 5, 6, 7], [1, 2, 3, 4]])
    assert next_tokens(labels).tolist() == [[5, 6, 7, -100], [2, 3, 4, -100]]
    segments = jnp.array([[1, 1, 2, 2], [1, 1, 1, 0]])
    assert next_tokens(labels, segments).tolist() == [[5, -100, 7, -100], [2, 3, -100, -100]]


@pytest.mark.parametrize('dtype', ['uint16', 'uint32', 'float32'])
def test_labels_that_cannot_say_none_are_refused(dtype: str):
    with pytest.raises(TypeError, match=f'since -100 says none: received {dtype}. Cast'):
        next_tokens(jnp.ones((1, 3), dtype))


@pytest.mark.parametrize(('dtype', 'vocabulary'), [('int8', 300), ('int16', 40000)])
def test_narrow_targets_count_to_a_large_vocabulary(dtype: str, vocabulary: int):
    hidden, head = normal(0, 1, 3, 2), normal(1, 2, vocabulary)
    targets = jnp.array([[1, 100, -100]], jnp.int32)
    found = next_token_loss(hidden, head, targets.astype(dtype))
    assert found == next_token_loss(hidden, head, targets) and np.isfinite(found.total)


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        ({'head': HEAD.T}, ValueError, r'embedding\.T'),
        ({'targets': TARGETS[:, 1:]}, ValueError, r'targets must be \(8, 13\)'),
        ({'weights': WEIGHTS[0]}, ValueError, r'weights must be \(8, 13\)'),
        ({'bias': BIAS[1:]}, ValueError, r'bias must be \(20,\)'),
        ({'head': HEAD.astype('bfloat16')}, TypeError, 'float32 and bfloat16'),
        (
            {'targets': TARGETS.astype('uint32')},
            TypeError,
            'since -100 says none: received uint32',
        ),
        ({'chunk': 0}, ValueError, 'chunk must be at least 1: received 0'),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        next_token_loss(**{'hidden': HIDDEN, 'head': HEAD, 'targets': TARGETS, **change})
