"""Layout operations on weights: what they do to labels and factors; random programs."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from quick import jit

import peftjax as pj
from peftjax import _layout
from peftjax._factor import Factor, lay, pick, place
from peftjax._layout import NONE

A, B, C = (frozenset({axis}) for axis in range(3))


def factor(*shape: int) -> jax.Array:
    count = int(np.prod(shape))
    return jnp.asarray(np.arange(1, 1 + count).reshape(shape), jnp.float32)


def check(layout, operation, shape, full, moved_dims):
    """A factor moves as the weight that it stands for does."""
    assert layout.dims == moved_dims
    f = factor(*(n if whole else 1 for n, whole in zip(shape, full, strict=True)), 2)
    moved = layout.move(Factor.formed(f), full).form()
    for r in range(2):
        weight = operation(jnp.broadcast_to(f[..., r], shape))
        np.testing.assert_array_equal(jnp.broadcast_to(moved[..., r], weight.shape), weight)


def test_transpose_moves_labels_and_factors():
    layout = _layout.transpose((A, B, C), (2, 0, 1))
    check(layout, lambda w: w.transpose(2, 0, 1), (2, 3, 4), (True, False, True), (C, A, B))


def test_squeeze_drops_dimensions():
    layout = _layout.squeeze((A, B, C), (-2,))
    check(layout, lambda w: w.squeeze(1), (2, 1, 4), (False, False, True), (A, C))


def test_window_cuts_what_a_factor_has():
    layout = _layout.window((A, B), (1, 0), (4, 5), (2, 3))
    check(layout, lambda w: w[1:4:2, :5:3], (4, 6), (True, False), (A, B))


def test_dynamic_window_clamps_as_the_weight_does():
    start = (jnp.int32(3), jnp.int32(1))
    layout = _layout.dynamic_window((A, B), start, (2, 3))
    operation = lambda w: lax.dynamic_slice(w, start, (2, 3))
    check(layout, operation, (4, 6), (True, False), (A, B))
    check(layout, operation, (4, 6), (False, True), (A, B))


def test_expand_gives_repeated_dimensions_no_label():
    layout = _layout.expand((A, B), (1, 3), (5, 2, 3), (0, 2))
    operation = lambda w: lax.broadcast_in_dim(w, (5, 2, 3), (0, 2))
    check(layout, operation, (1, 3), (False, True), (NONE, NONE, B))


def test_reshape_splits_and_merges():
    layout = _layout.reshape((A, B, C), (6, 2, 4), (2, 3, 8))
    operation = lambda w: w.reshape(2, 3, 8)
    check(layout, operation, (6, 2, 4), (True, False, False), (A, A, B | C))
    check(layout, operation, (6, 2, 4), (False, True, True), (A, A, B | C))


def test_reshape_that_mixes_axes_leaves_a_factor_no_form():
    layout = _layout.reshape((A, B), (4, 6), (24,))
    assert layout.move(Factor.formed(factor(4, 1, 2)), (True, False)) is None


def test_reshape_of_nothing_has_no_layout():
    assert _layout.reshape((A, B), (0, 6), (6, 0)) is None


@pytest.mark.parametrize(
    'old, new, groups',
    [
        ((6, 4), (2, 3, 4), [([0], [0, 1]), ([1], [2])]),
        ((2, 3, 4), (24,), [([0, 1, 2], [0])]),
        ((1, 6), (6, 1), [([0], []), ([1], [0]), ([], [1])]),
        ((4, 6), (6, 4), [([0, 1], [0, 1])]),
        ((), (1,), [([], [0])]),
    ],
)
def test_reshapes_are_read_in_row_major_order(old, new, groups):
    assert _layout._groups(old, new) == groups


# Factors ------------------------------------------------------------------------------------------


def test_a_factor_stays_as_it_lies_until_it_is_used():
    array = factor(5, 2, 4)  # (stack, rank, out)
    f = lay(array, (0, None, 2), 3)
    assert f.array is array and f.order == (0, None, 2, 1)
    np.testing.assert_array_equal(f.form(), array.transpose(0, 2, 1)[:, None])
    untouched = jax.make_jaxpr(lambda a: pick(Factor(a, f.order), (0, None, 2), 3))(array)
    assert not untouched.eqns
    np.testing.assert_array_equal(pick(f, (2, 0), 3), array.transpose(2, 0, 1))


def test_transposing_a_weight_moves_no_factor():
    f = lay(factor(6, 2), (0, None), 2)
    turned = _layout.transpose((A, B), (1, 0)).move(f, (True, False))
    assert turned.array is f.array
    np.testing.assert_array_equal(turned.form(), f.form().transpose(1, 0, 2))


def test_place_gives_missing_axes_the_size_one():
    assert place(factor(4, 5, 2), (2, 0), 3).shape == (5, 1, 4, 2)
    assert place(factor(), (), 2).shape == (1, 1)


# Random programs ----------------------------------------------------------------------------------


def divisors(n: int) -> list[int]:
    return [d for d in range(2, n) if n % d == 0]


@st.composite
def steps(draw, shape: tuple[int, ...]):
    """One layout operation that applies to a shape, as data; with the shape that it makes."""
    spots = st.integers(0, len(shape) - 1)
    kind = draw(st.sampled_from(['transpose', 'slice', 'split', 'merge', 'expand', 'scale', 'cut']))
    d = draw(spots)
    if kind == 'transpose':
        order = draw(st.permutations(range(len(shape))))
        return lambda w: w.transpose(order), tuple(shape[i] for i in order)
    if kind == 'slice' and shape[d] > 1:
        index = (slice(None),) * d + (slice(1, None, draw(st.integers(1, 2))),)
        return lambda w: w[index], jax.eval_shape(lambda w: w[index], jnp.zeros(shape)).shape
    if kind == 'cut' and len(shape) > 2:
        i = draw(st.integers(0, shape[d] - 1))
        return lambda w: lax.dynamic_index_in_dim(w, i, d, False), shape[:d] + shape[d + 1 :]
    if kind == 'split' and divisors(shape[d]):
        n = draw(st.sampled_from(divisors(shape[d])))
        new = (*shape[:d], n, shape[d] // n, *shape[d + 1 :])
        return lambda w: w.reshape(new), new
    if kind == 'merge' and d + 1 < len(shape):
        new = (*shape[:d], shape[d] * shape[d + 1], *shape[d + 2 :])
        return lambda w: w.reshape(new), new
    if kind == 'expand':
        return lambda w: jnp.expand_dims(w, d), (*shape[:d], 1, *shape[d:])
    if kind == 'scale':
        return lambda w: 2 * w, shape
    return lambda w: w, shape


@st.composite
def uses(draw, shape: tuple[int, ...]):
    """A function of the weight as it stands after some layout operations."""
    dims = range(len(shape))
    kind = draw(st.sampled_from(['dot', 'dot', 'dot', 'gather', 'scan', 'add']))
    if kind == 'scan' and len(shape) > 1:
        inner = draw(uses(shape[1:]))
        return lambda w: lax.scan(lambda c, w: (c + 1, inner(w)), 0, w)[1]
    if kind == 'gather':
        return lambda w: w[jnp.array([[0], [shape[0] - 1]])]
    if kind == 'add':
        return lambda w: jnp.tanh(w + 1) + w
    parts = draw(st.lists(st.sampled_from('cbf'), min_size=len(shape), max_size=len(shape)))
    contract, batch = (tuple(d for d in dims if parts[d] == part) for part in 'cb')
    x = factor(*(shape[d] for d in (*batch, *contract)), 3)
    x = x / x.sum()
    n = len(batch)
    other = (tuple(range(n, n + len(contract))), tuple(range(n)))
    if draw(st.booleans()):
        return lambda w: lax.dot_general(w, x, ((contract, other[0]), (batch, other[1])))
    return lambda w: lax.dot_general(x, w, ((other[0], contract), (other[1], batch)))


@st.composite
def programs(draw):
    """A function of one weight, with its shape."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=4)))
    start, chain = shape, []
    for _ in range(draw(st.integers(0, 4))):
        step, shape = draw(steps(shape))
        chain.append(step)
    use = draw(uses(shape))

    def program(params, x):
        w = params['w']
        for step in chain:
            w = step(w)
        return jnp.sin(use(w)) + x

    return program, start


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None)
@hypothesis.given(programs())
def test_random_programs_equal_the_merged_ones(pair):
    program, shape = pair
    rng = np.random.default_rng(0)
    draw = lambda *sizes: jnp.asarray(rng.normal(size=sizes), jnp.float32)
    params, x = {'w': draw(*shape)}, jnp.zeros(())
    kinds = {site.kind for site in pj.sites(program, params, x)}
    hypothesis.assume(not kinds <= {'bias', 'scale'})
    peft = pj.attach(pj.Lora(rank=1, target='w'), program, params, x)
    phi = jax.tree.map(lambda a: draw(*a.shape), peft.init(jax.random.key(0), params))
    both = lambda params, phi: (
        peft.wrap(program)(params, phi, x),
        program(peft.merge(params, phi), x),
    )
    ours, merged = jit(both)(params, phi)
    np.testing.assert_allclose(ours, merged, rtol=1e-4, atol=1e-4)
