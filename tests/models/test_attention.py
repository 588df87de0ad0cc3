"""The fused attention core and GELU against the formulas as they read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from peftjax.models import attention, plain_attention
from peftjax.models._activations import gelu
from peftjax.models._dropout import keep

MASK = jnp.arange(5)[None] < jnp.array([[5], [3]])


def draw(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (2, 5, 3, 4), dtype) for key in keys)


KEPT = keep(jax.random.key(2), 0.3, (2, 3, 5, 5))


@pytest.mark.parametrize('dropout', [(), (KEPT, 0.3)], ids=['whole', 'dropped'])
@pytest.mark.parametrize('mask', [None, MASK], ids=['all', 'padded'])
def test_values_and_gradients_are_those_of_the_formula(mask, dropout):
    qkv = draw()
    weight = jax.random.normal(jax.random.key(1), (2, 5, 3, 4))
    run = lambda f: jax.value_and_grad(lambda qkv: (f(*qkv, mask, *dropout) * weight).sum())(qkv)
    fused, plain = run(attention), run(plain_attention)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), fused, plain)
    np.testing.assert_allclose(
        attention(*qkv, mask, *dropout),
        plain_attention(*qkv, mask, *dropout),
        rtol=1e-5,
        atol=1e-6,
    )


def test_dropout_of_attention_is_dropout_of_its_weights():
    """With unit vectors as values, attention returns its weights."""
    query, key, _ = draw()
    units = jnp.broadcast_to(jnp.eye(5)[:, None], (2, 5, 3, 5))
    weights = attention(query, key, units)
    dropped = attention(query, key, units, None, KEPT, 0.3)
    expected = jnp.where(KEPT.transpose(0, 2, 1, 3), weights / 0.7, 0)
    np.testing.assert_allclose(dropped, expected, rtol=1e-5, atol=1e-7)


def test_masked_keys_and_their_gradients_are_exactly_absent():
    query, key, value = draw()
    loss = lambda key, value: (attention(query, key, value, MASK) ** 2).sum()
    d_key, d_value = jax.grad(loss, (0, 1))(key, value)
    assert not d_key[1, 3:].any() and not d_value[1, 3:].any()
    other = attention(query, key.at[1, 3:].set(7.0), value.at[1, 3:].set(9.0), MASK)
    np.testing.assert_array_equal(other, attention(query, key, value, MASK))


def test_second_order_and_vmap():
    qkv = draw()

    def slope(f):
        inner = jax.grad(lambda q, k, v: (jnp.sin(f(q, k, v, MASK))).sum(), (0, 1, 2))
        return jax.grad(lambda qkv: sum((d**2).sum() for d in inner(*qkv)))(qkv)

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, slope(attention), slope(plain_attention))
    # forward over reverse works too; forward alone is what the plain form is for
    grad = jax.grad(lambda q: attention(q, *qkv[1:], MASK).sum())
    plain = jax.grad(lambda q: plain_attention(q, *qkv[1:], MASK).sum())
    close(*(jax.jvp(g, qkv[:1], qkv[:1])[1] for g in (grad, plain)))
    jax.jvp(lambda q: plain_attention(q, *qkv[1:], MASK), qkv[:1], qkv[:1])
    with pytest.raises(TypeError, match='forward-mode'):
        jax.jvp(lambda q: attention(q, *qkv[1:], MASK), qkv[:1], qkv[:1])
    stacked = tuple(jnp.stack([x, 2 * x]) for x in qkv)
    many = jax.vmap(lambda *x: attention(*x, MASK))(*stacked)
    close(many[1], attention(*(2 * x for x in qkv), MASK))


def test_cross_lengths_and_large_scores():
    query, key, value = draw()
    out = attention(100 * query[:, :2], 100 * key, value, MASK)
    expected = plain_attention(100 * query[:, :2], 100 * key, value, MASK)
    assert out.shape == (2, 2, 3, 4)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_stays_near_the_formula():
    low = attention(*draw(jnp.bfloat16), MASK)
    exact = plain_attention(*(x.astype(jnp.float32) for x in draw(jnp.bfloat16)), MASK)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize('form', [attention, plain_attention])
def test_bfloat16_gradients_stay_near_those_of_the_formula(form):
    run = jax.grad(lambda qkv, f: f(*qkv, MASK).astype(jnp.float32).var(), argnums=0)
    qkv = draw(jnp.bfloat16)
    low = run(qkv, form)
    exact = run(tuple(x.astype(jnp.float32) for x in qkv), plain_attention)
    for one, other in zip(low, exact, strict=True):
        assert one.dtype == jnp.bfloat16
        gap = np.abs(one.astype(jnp.float32) - other).max()
        assert gap < 0.02 * np.abs(other).max()


def test_the_plain_form_has_forward_derivatives_in_bfloat16():
    qkv = draw(jnp.bfloat16)
    loss = lambda *qkv: plain_attention(*qkv, MASK).astype(jnp.float32).var()
    _, along = jax.jvp(loss, qkv, qkv)
    grads = jax.grad(loss, (0, 1, 2))(*qkv)
    sides = [(g * x).astype(jnp.float32).sum() for g, x in zip(grads, qkv, strict=True)]
    np.testing.assert_allclose(along, sum(sides), rtol=0.05)


def test_gelu_is_exact_and_keeps_its_slope():
    x = jnp.linspace(-8, 8, 401)
    reference = lambda x: jax.nn.gelu(x, approximate=False)
    np.testing.assert_allclose(gelu(x), reference(x), rtol=1e-5, atol=5e-7)
    each = lambda f: jax.vmap(jax.grad(f))(x)
    np.testing.assert_allclose(each(gelu), each(reference), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(jax.grad(jax.grad(gelu)))(x), jax.vmap(jax.grad(jax.grad(reference)))(x), atol=1e-5
    )
    check_grads(gelu, (x[::40],), order=2, modes=['fwd', 'rev'], rtol=2e-2)
    _, pullback = jax.vjp(gelu, x)
    sizes = [leaf.shape for leaf in jax.tree.leaves(pullback)]
    assert sizes.count(x.shape) == 1
    assert gelu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize('what', ['flops', 'bytes accessed'])
def test_gelu_costs_no_more_than_the_plain_form(what):
    """Counted in compiled programs, and so true where it was not timed."""
    x = jnp.linspace(-6, 6, 1024)
    forward = lambda f: lambda x, d: f(x)
    backward = lambda f: lambda x, d: jax.vjp(f, x)[1](d)
    plain = lambda x: jax.nn.gelu(x, approximate=False)
    for way in (forward, backward):
        own, other = (jax.jit(way(f)).lower(x, x).compile().cost_analysis() for f in (gelu, plain))
        assert own[what] <= other[what]
