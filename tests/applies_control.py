"""The zoo, second wing: weights inside control flow and calls."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from zoo import APPLIES, Case, X, bare, normal

SQUARE = normal(2, 6, 6, fan=6)
STACK = normal(2, 3, 6, 6, fan=6)
# On CPU, XLA compiles a loop over a few hundred bytes by other means (`xla_cpu_small_call` in the
# compiled text), with other bits: so small a base and its larger adapted form would differ.
ROWS = normal(0, 48, 6)


@APPLIES
def inner_jit() -> Case:
    @jax.jit
    def inner(w, x):
        return jnp.tanh(x @ w)

    return bare(lambda w, x: inner(w, inner(w.T, x)), SQUARE, X)


@APPLIES
def remat() -> Case:
    policy = jax.checkpoint_policies.save_only_these_names('hidden')

    @functools.partial(jax.checkpoint, policy=policy)
    def block(w, x):
        return jnp.tanh(checkpoint_name(x @ w, 'hidden') @ w)

    return bare(block, SQUARE, X)


@APPLIES
def scan_xs() -> Case:
    def fn(w, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), x.sum()), x, w)

    return bare(fn, STACK, ROWS)


@APPLIES
def scan_reverse() -> Case:
    def fn(w, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w, reverse=True, unroll=2)[0]

    return bare(fn, STACK, ROWS)


@APPLIES
def scan_consts() -> Case:
    def fn(w, x):
        return lax.scan(lambda x, _: (jnp.tanh(x @ w), x), x, None, length=3)

    return bare(fn, SQUARE, ROWS)


@APPLIES
def scan_carry() -> Case:
    def step(carry, _):
        count, w, x = carry
        return (count + 1, w, jnp.tanh(x @ w)), count

    def fn(w, x):
        return lax.scan(step, (0, w, x), None, length=3)

    served = ('efficient', 'dense: is an output')
    return bare(fn, SQUARE, ROWS, served=served, notes='goes round unchanged; then it is returned')


@APPLIES
def scan_carry_changed() -> Case:
    def fn(w, x):
        def step(carry, _):
            w, x = carry
            return (w.T, jnp.tanh(x @ w)), None

        return lax.scan(step, (w, x), None, length=3)[0][1]

    return bare(fn, SQUARE, ROWS, served=('dense: enters scan',))


@APPLIES
def scan_stacked() -> Case:
    def block(x, layer):
        up = jnp.tanh(x @ layer['up']['w'] + layer['up']['b'][None])
        return x + up @ layer['down']['w'].T, None

    layers = {
        'up': {'w': normal(2, 3, 6, 4, fan=6), 'b': normal(3, 3, 4)},
        'down': {'w': normal(4, 3, 6, 4, fan=4)},
    }
    return Case(
        fn=lambda p, x: lax.scan(block, x, p['layers'])[0],
        params={'layers': layers},
        args=(ROWS,),
        target='/w',
    )


@APPLIES
def scan_nested() -> Case:
    def fn(w, x):
        def inner(x, w):
            return jnp.tanh(x @ w), None

        def outer(x, w):
            return lax.scan(inner, x, w)

        return lax.scan(outer, x, w)[0]

    return bare(fn, normal(2, 2, 3, 6, 6, fan=6), ROWS)


@APPLIES
def scan_remat() -> Case:
    def fn(w, x):
        block = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return lax.scan(block, x, w)[0]

    return bare(fn, STACK, ROWS)


@APPLIES
def scan_chunks() -> Case:
    def fn(w, x):
        chunks = w.reshape(6, 2, 2).transpose(1, 0, 2)
        return lax.map(lambda w: jnp.tanh(x @ w), chunks)

    return bare(fn, normal(2, 6, 4, fan=6), ROWS, notes='scans over pieces of the output axis')


@APPLIES
def scan_input_chunks() -> Case:
    def fn(w, x):
        def step(y, piece):
            w, x = piece
            return y + x @ w, None

        pieces = (w.reshape(2, 3, 4), x.reshape(48, 2, 3).transpose(1, 0, 2))
        return lax.scan(step, jnp.zeros((48, 4)), pieces)[0]

    return bare(fn, normal(2, 6, 4, fan=6), ROWS, notes='scans over pieces of the input axis')


@APPLIES
def while_loop() -> Case:
    def fn(w, x):
        def go_on(state):
            i, x = state
            return (i < 3) & (jnp.abs(x).sum() < 1e3)

        return lax.while_loop(go_on, lambda s: (s[0] + 1, jnp.tanh(s[1] @ w)), (0, x))[1]

    return bare(fn, SQUARE, ROWS, reverse=False)


@APPLIES
def while_carry() -> Case:
    def fn(w, x):
        def go_on(state):
            i, w, x = state
            return (x @ w).sum() * 0 + i < 3

        def step(state):
            i, w, x = state
            return i + 1, w, jnp.tanh(x @ w)

        return lax.while_loop(go_on, step, (jnp.float32(0), w, x))[2]

    return bare(fn, SQUARE, ROWS, reverse=False)


@APPLIES
def fori_loop() -> Case:
    def fn(w, x):
        return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w[i]), x)

    return bare(fn, STACK, ROWS)


@APPLIES
def cond() -> Case:
    def fn(w, x):
        return lax.cond(x.sum() > 0, lambda w: jnp.tanh(x @ w), lambda w: x @ w.T, w)

    return bare(fn, SQUARE, X)


@APPLIES
def switch() -> Case:
    def fn(w, x, i):
        branches = [lambda x: x, lambda x: x @ w, lambda x: jnp.tanh(x @ w)]
        return lax.switch(i, branches, x)

    return bare(fn, SQUARE, X, jnp.int32(2))


@APPLIES
def custom_jvp_inside() -> Case:
    return bare(lambda w, x: jax.nn.silu(jax.nn.relu(x @ w) + 1) @ w, SQUARE, X)


@APPLIES
def custom_jvp_of_weight() -> Case:
    @jax.custom_jvp
    def product(w, x):
        return x @ w

    @product.defjvp
    def _(primals, tangents):
        (w, x), (dw, dx) = primals, tangents
        return x @ w, 2 * (dx @ w + x @ dw)

    return bare(product, SQUARE, X, served=('dense: enters custom_jvp_call',))


@APPLIES
def custom_vjp_of_weight() -> Case:
    @jax.custom_vjp
    def product(w, x):
        return x @ w

    def back(saved, dy):
        w, x = saved
        return 2 * x.T @ dy, dy @ w.T

    product.defvjp(lambda w, x: (x @ w, (w, x)), back)
    served = ('dense: enters custom_vjp_call',)
    return bare(product, SQUARE, X, served=served, forward=False)


@APPLIES
def custom_vjp_beside() -> Case:
    @jax.custom_vjp
    def square(x):
        return x * x

    square.defvjp(lambda x: (x * x, x), lambda x, dy: (2 * x * dy,))
    return bare(lambda w, x: square(x @ w), SQUARE, X, forward=False)


def _mesh(name: str):
    return jax.make_mesh((2,), (name,), axis_types=(jax.sharding.AxisType.Auto,))


@APPLIES
def shard_map_columns() -> Case:
    P = jax.sharding.PartitionSpec
    fn = jax.shard_map(
        lambda w, x: jnp.tanh(x @ w),
        mesh=_mesh('model'),
        in_specs=(P(None, 'model'), P()),
        out_specs=P(None, 'model'),
    )
    return bare(fn, normal(2, 6, 4, fan=6), X, meshed=True)


@APPLIES
def shard_map_rows() -> Case:
    P = jax.sharding.PartitionSpec
    fn = jax.shard_map(
        lambda w, x: lax.psum(x @ w, 'model'),
        mesh=_mesh('model'),
        in_specs=(P('model', None), P(None, 'model')),
        out_specs=P(),
    )
    return bare(fn, normal(2, 6, 4, fan=6), X, meshed=True)


@APPLIES
def shard_map_data() -> Case:
    P = jax.sharding.PartitionSpec
    fn = jax.shard_map(
        lambda w, x: jnp.tanh(x @ w),
        mesh=_mesh('data'),
        in_specs=(P(), P('data')),
        out_specs=P('data'),
    )
    return bare(fn, normal(2, 6, 4, fan=6), normal(0, 4, 6), meshed=True)


@APPLIES
def gradients_inside() -> Case:
    def fn(p, x):
        def energy(p, x):
            return jnp.sum(jnp.tanh(x @ p['w']) @ p['w'].T)

        by_params, by_x = jax.grad(energy, (0, 1))(p, x)
        each = jax.vmap(jax.grad(energy, 1), (None, 0))(p, x[:, None])
        return by_params['w'] @ x.T, by_x, each

    return Case(fn=fn, params={'w': SQUARE}, args=(X,), notes='the function differentiates itself')


@APPLIES
def barrier() -> Case:
    def fn(w, x):
        w, x = lax.optimization_barrier((w, x))
        return x @ lax.optimization_barrier(w)

    return bare(fn, SQUARE, X, served=('dense: enters optimization_barrier',))


@APPLIES
def cast_then_scanned() -> Case:
    def fn(w, x):
        w, x = w.astype(jnp.bfloat16), x.astype(jnp.bfloat16)
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    return bare(fn, STACK, ROWS, tolerance=5e-2)
