"""The zoo, first wing: dots, convolutions and lookups."""

from typing import Any

import jax
import jax.numpy as jnp
from zoo import APPLIES, TOKENS, Case, X, bare, ids, normal

# Dots ---------------------------------------------------------------------------------------------


@APPLIES
def plain() -> Case:
    return bare(lambda w, x: x @ w, normal(2, 6, 4, fan=6), X)


@APPLIES
def batched_input() -> Case:
    return bare(lambda w, x: x @ w, normal(2, 6, 4, fan=6), normal(1, 2, 3, 6))


@APPLIES
def vector_input() -> Case:
    return bare(lambda w, x: x @ w, normal(2, 6, 4, fan=6), normal(1, 6))


@APPLIES
def transposed() -> Case:
    return bare(lambda w, x: x @ w.T, normal(2, 4, 6, fan=6), X)


@APPLIES
def with_bias() -> Case:
    params = {'up': {'kernel': normal(2, 6, 4, fan=6), 'bias': normal(3, 4)}}
    return Case(
        fn=lambda p, x: jnp.tanh(x @ p['up']['kernel'] + p['up']['bias'][None]),
        params=params,
        args=(X,),
        target='kernel',
    )


@APPLIES
def tied() -> Case:
    def fn(w, tokens):
        return jnp.tanh(w[tokens]) @ w.T

    return bare(fn, normal(2, 7, 6, fan=6), TOKENS, notes='a gather and a dot of one leaf')


@APPLIES
def index_static() -> Case:
    def fn(w, x):
        for i in range(3):
            x = jnp.tanh(x @ w[i])
        return x

    return bare(fn, normal(2, 3, 6, 6, fan=6), X)


@APPLIES
def index_traced() -> Case:
    return bare(lambda w, x, i: x @ w[i], normal(2, 3, 6, 4, fan=6), X, jnp.int32(1))


@APPLIES
def index_last() -> Case:
    return bare(lambda w, x: x @ w[:, :, -1], normal(2, 6, 4, 3, fan=6), X)


@APPLIES
def fused_qkv() -> Case:
    def fn(w, x):
        q, k, v = jnp.split(x @ w, 3, axis=-1)
        return jax.nn.softmax(q @ k.T) @ v

    return bare(fn, normal(2, 6, 12, fan=6), X)


@APPLIES
def split_before() -> Case:
    def fn(w, x):
        q, k, v = jnp.split(w, 3, axis=1)
        return jnp.tanh(x @ q) * (x @ k) + x @ v

    return bare(fn, normal(2, 6, 12, fan=6), X)


@APPLIES
def sliced_before() -> Case:
    def fn(w, x):
        return (x @ w[:, :3], x[:, :2] @ w[::3, 1:])

    return bare(fn, normal(2, 6, 5, fan=6), X)


@APPLIES
def dynamic_sliced_before() -> Case:
    def fn(w, x, start):
        return x @ jax.lax.dynamic_slice_in_dim(w, start, 3, axis=1)

    return bare(fn, normal(2, 6, 5, fan=6), X, jnp.int32(1))


@APPLIES
def reshaped() -> Case:
    def fn(w, x):
        return x @ w.reshape(2, 2, 6).transpose(2, 1, 0).reshape(6, 4)

    return bare(fn, normal(2, 4, 6, fan=6), X)


@APPLIES
def reshaped_mixing() -> Case:
    return bare(
        lambda w, x: x @ w.reshape(6, 4),
        normal(2, 4, 6, fan=6),
        X,
        served=('dense: enters reshape',),
        notes='rows and columns are mixed: no factor survives',
    )


@APPLIES
def flat() -> Case:
    return bare(
        lambda w, x: x @ w.reshape(6, 4),
        normal(2, 2, 12, fan=6),
        X,
        served=('dense: enters reshape',),
    )


@APPLIES
def squeezed() -> Case:
    return bare(lambda w, x: x @ w[0, :, None, :].reshape(6, 4), normal(2, 1, 6, 4, fan=6), X)


@APPLIES
def broadcast() -> Case:
    def fn(w, x):
        return jax.lax.batch_matmul(x, jnp.broadcast_to(w[None], (2, 6, 4)))

    return bare(fn, normal(2, 6, 4, fan=6), normal(0, 2, 3, 6))


@APPLIES
def cast_before() -> Case:
    def fn(w, x):
        return x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)

    return bare(fn, normal(2, 6, 4, fan=6), X, tolerance=3e-2)


@APPLIES
def wide_output() -> Case:
    def fn(w, x):
        x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
        return jnp.dot(x, w, preferred_element_type=jnp.float32)

    return bare(fn, normal(2, 6, 4, fan=6), X, tolerance=3e-2)


@APPLIES
def precise() -> Case:
    return bare(lambda w, x: jnp.dot(x, w, precision='highest'), normal(2, 6, 4, fan=6), X)


@APPLIES
def einsum_first() -> Case:
    return bare(lambda w, x: jnp.einsum('oi,bi->ob', w, x), normal(2, 4, 6, fan=6), X)


@APPLIES
def einsum_middle() -> Case:
    def fn(w, x, z):
        return jnp.einsum('bi,io,bo->b', x, w, z)

    return bare(fn, normal(2, 6, 4, fan=6), X, normal(3, 3, 4))


@APPLIES
def einsum_heads_out() -> Case:
    def fn(w, x):
        return jnp.einsum('btd,dhk->bthk', x, w)

    return bare(fn, normal(2, 6, 2, 4, fan=6), normal(0, 2, 3, 6))


@APPLIES
def einsum_heads_in() -> Case:
    def fn(w, x):
        return jnp.einsum('bthk,hkd->btd', x, w)

    return bare(fn, normal(2, 2, 4, 5, fan=8), normal(0, 2, 3, 2, 4))


@APPLIES
def einsum_heads_apart() -> Case:
    def fn(w, x):
        return jnp.einsum('bthk,hdk->bdt', x, w)

    return bare(fn, normal(2, 2, 5, 4, fan=8), normal(0, 2, 3, 2, 4))


@APPLIES
def experts() -> Case:
    def fn(w, x):
        return jnp.einsum('ebd,edf->ebf', x, w)

    return bare(fn, normal(2, 2, 6, 4, fan=6), normal(0, 2, 3, 6))


@APPLIES
def experts_first() -> Case:
    def fn(w, x):
        return jnp.einsum('fed,bed->ebf', w, x)

    return bare(fn, normal(2, 4, 2, 6, fan=6), normal(0, 3, 2, 6))


@APPLIES
def experts_chosen() -> Case:
    def fn(w, x, which):
        return jnp.einsum('bd,bdf->bf', x, w[which])

    return bare(
        fn, normal(2, 4, 6, 5, fan=6), X, ids(0, 4, 3), notes='rows of experts are looked up'
    )


@APPLIES
def ensemble() -> Case:
    def fn(w, x):
        return jax.vmap(lambda w: jnp.tanh(x @ w))(w)

    return bare(fn, normal(2, 2, 6, 4, fan=6), X)


@APPLIES
def ragged() -> Case:
    def fn(w, x, sizes):
        return jax.lax.ragged_dot(x, w, sizes)

    sizes = jnp.array([2, 0, 3], jnp.int32)
    return bare(
        fn,
        normal(2, 3, 6, 4, fan=6),
        normal(0, 5, 6),
        sizes,
        twice=False,
        mapped=False,
        notes='JAX itself has neither vmap nor second derivatives of ragged_dot',
    )


@APPLIES
def scaled() -> Case:
    return bare(
        lambda w, x: x @ (0.5 * w), normal(2, 6, 4, fan=6), X, served=('dense: enters mul',)
    )


@APPLIES
def concatenated() -> Case:
    params = {'q': normal(2, 6, 4, fan=6), 'k': normal(3, 6, 2, fan=6)}
    return Case(
        fn=lambda p, x: x @ jnp.concatenate([p['q'], p['k']], axis=1),
        params=params,
        args=(X,),
        served=('dense: enters concatenate',),
    )


@APPLIES
def weight_meets_weight() -> Case:
    def fn(p, x):
        return x @ (p['up'] @ p['down'])

    return Case(
        fn=fn,
        params={'up': normal(2, 6, 4, fan=6), 'down': normal(3, 4, 5, fan=4)},
        args=(X,),
        served=('efficient', 'dense: meets another adapted weight'),
        notes='each is the input of the other',
    )


@APPLIES
def returned() -> Case:
    return bare(
        lambda w, x: {'y': x @ w, 'w': w},
        normal(2, 6, 4, fan=6),
        X,
        served=('efficient', 'dense: is an output'),
    )


@APPLIES
def same_weight_twice() -> Case:
    return bare(lambda w, x: jnp.tanh(x @ w) @ w, normal(2, 6, 6, fan=6), X)


@APPLIES
def both_ways() -> Case:
    return bare(lambda w, x: jnp.tanh(x @ w) @ w.T, normal(2, 6, 4, fan=6), X)


@APPLIES
def loop_of_modules() -> Case:
    def layer(p, x):
        return jnp.tanh(x @ p['w'] + p['b'][None])

    def fn(params, x):
        for _ in range(2):
            for p in params['layers']:
                x = layer(p, x)
        return x

    layers = [{'w': normal(i, 6, 6, fan=6), 'b': normal(9, 6, fan=6)} for i in range(2)]
    return Case(fn=fn, params={'layers': layers}, args=(X,), target='/w')


# Convolutions -------------------------------------------------------------------------------------


def conv(w_shape: tuple[int, ...], x_shape: tuple[int, ...], layout: Any, **how: Any) -> Case:
    """A convolution; `layout` as for `lax.conv_general_dilated`."""
    how = {'window_strides': (1,) * (len(w_shape) - 2), 'padding': 'SAME', **how}

    def fn(w, x):
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=layout, **how)

    return bare(fn, normal(2, *w_shape, fan=12), normal(0, *x_shape))


@APPLIES
def conv_nhwc() -> Case:
    return conv((3, 2, 3, 4), (2, 5, 4, 3), ('NHWC', 'HWIO', 'NHWC'))


@APPLIES
def conv_nchw() -> Case:
    return conv((4, 3, 3, 2), (2, 3, 5, 4), ('NCHW', 'OIHW', 'NCHW'))


@APPLIES
def conv_layouts_differ() -> Case:
    return conv((3, 2, 3, 4), (2, 3, 5, 4), ('NCHW', 'HWIO', 'NHWC'))


@APPLIES
def conv_dilated() -> Case:
    return conv((3, 2, 3, 4), (2, 6, 5, 3), ('NHWC', 'HWIO', 'NHWC'), rhs_dilation=(2, 1))


@APPLIES
def conv_strided() -> Case:
    how = {'window_strides': (2, 1), 'padding': ((1, 0), (0, 2))}
    return conv((3, 2, 3, 4), (2, 6, 5, 3), ('NHWC', 'HWIO', 'NHWC'), **how)


@APPLIES
def conv_transposed() -> Case:
    how = {'lhs_dilation': (2, 2), 'padding': ((1, 1), (1, 1))}
    return conv((3, 2, 3, 4), (2, 4, 3, 3), ('NHWC', 'HWIO', 'NHWC'), **how)


@APPLIES
def conv_grouped() -> Case:
    return conv((3, 2, 2, 6), (2, 5, 4, 4), ('NHWC', 'HWIO', 'NHWC'), feature_group_count=2)


@APPLIES
def conv_depthwise() -> Case:
    return conv((3, 2, 1, 6), (2, 5, 4, 3), ('NHWC', 'HWIO', 'NHWC'), feature_group_count=3)


@APPLIES
def conv_grouped_nchw() -> Case:
    return conv((6, 2, 3, 2), (2, 4, 5, 4), ('NCHW', 'OIHW', 'NCHW'), feature_group_count=2)


@APPLIES
def conv_1d() -> Case:
    return conv((3, 3, 4), (2, 5, 3), ('NWC', 'WIO', 'NWC'))


@APPLIES
def conv_3d() -> Case:
    return conv((2, 2, 1, 3, 4), (2, 3, 4, 2, 3), ('NDHWC', 'DHWIO', 'NDHWC'))


# Lookups ------------------------------------------------------------------------------------------


@APPLIES
def gather() -> Case:
    return bare(lambda w, tokens: w[tokens], normal(2, 7, 4), TOKENS)


@APPLIES
def take() -> Case:
    return bare(lambda w, tokens: jnp.take(w, tokens, axis=0), normal(2, 7, 4), TOKENS)


@APPLIES
def take_filling() -> Case:
    def fn(w, tokens):
        return w.at[tokens].get(mode='fill', fill_value=3.0)

    return bare(fn, normal(2, 6, 4), TOKENS, notes='id 6 is out of bounds')


@APPLIES
def take_columns() -> Case:
    return bare(lambda w, tokens: jnp.take(w, tokens, axis=1), normal(2, 4, 7), TOKENS)


@APPLIES
def lookup_vmapped() -> Case:
    def fn(w, tokens):
        return jax.vmap(jax.vmap(lambda i: w[i]))(tokens)

    return bare(fn, normal(2, 7, 4), TOKENS)


@APPLIES
def lookup_one_hot() -> Case:
    return bare(lambda w, tokens: jax.nn.one_hot(tokens, 7) @ w, normal(2, 7, 4), TOKENS)


@APPLIES
def lookup_of_heads() -> Case:
    return bare(lambda w, tokens: w[tokens], normal(2, 7, 2, 4), TOKENS)


@APPLIES
def lookup_in_stack() -> Case:
    def fn(w, tokens):
        return w[0][tokens] + w[1][tokens]

    return bare(fn, normal(2, 2, 7, 4), TOKENS)


@APPLIES
def lookup_ensemble() -> Case:
    def fn(w, tokens):
        return jax.vmap(lambda w, t: w[t], (0, 1))(w, tokens)

    return bare(fn, normal(2, 5, 7, 4), TOKENS, notes='a table for each column of tokens')


@APPLIES
def lookup_of_pairs() -> Case:
    def fn(w, tokens):
        return w[tokens[..., 0], tokens[..., 1]]

    return bare(fn, normal(2, 7, 7, 4), TOKENS, notes='two axes are looked up')
