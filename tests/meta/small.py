"""A small model, tasks for it, and algorithms written by hand."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peftjax as pj

WIDTH, HIDDEN, WAYS, TASKS, SHOTS, QUERIES = 4, 6, 3, 3, 6, 9


def drawn(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.result_type(float))


def make_params():
    return {
        'up': {'kernel': drawn(0, WIDTH, HIDDEN) / 2, 'bias': drawn(1, HIDDEN) / 2},
        'head': {'kernel': drawn(2, HIDDEN, WAYS) / 2, 'bias': drawn(3, WAYS) / 2},
    }


def model(params, x):
    hidden = jnp.tanh(x @ params['up']['kernel'] + params['up']['bias'])
    return hidden @ params['head']['kernel'] + params['head']['bias']


METHODS = {
    'lora': pj.Lora(rank=2, target='kernel'),
    'ia3': pj.Ia3(target='kernel'),
    'adapter': pj.Adapter(target='up/kernel', reduction=2),
    'theta itself': pj.Trainable(target='.'),
    'chain': pj.chain(lora=pj.Lora(rank=1, target='up'), head=pj.Trainable(target='head')),
}


def make(method='lora'):
    """Theta, phi off its start, and a loss that draws noise from its key."""
    params = make_params()
    peft = pj.attach(METHODS[method], model, params, drawn(4, SHOTS, WIDTH))
    phi, forward = peft.init(jax.random.key(0), params), peft.wrap(model)
    leaves, tree = jax.tree.flatten(phi)
    leaves = [
        x.astype(jnp.result_type(float)) + drawn(9 + i, *x.shape) / 4 for i, x in enumerate(leaves)
    ]

    def loss(params, phi, batch, key):
        x, labels = batch
        x = x + jax.random.normal(key, x.shape, x.dtype) / 8
        said = jax.nn.log_softmax(forward(params, phi, x))
        return -jnp.take_along_axis(said, labels[:, None], -1).mean()

    return params, jax.tree.unflatten(tree, leaves), loss


def tasks(count=TASKS, seed=5):
    def half(seed, rows):
        labels = np.random.default_rng(seed).integers(0, WAYS, (count, rows))
        return drawn(seed, count, rows, WIDTH), jnp.asarray(labels, jnp.int32)

    return half(seed, SHOTS), half(seed + 1, QUERIES)


def task(every, i):
    return jax.tree.map(lambda x: x[i], every)


def keys_of(key, i, steps):
    """The keys of a task: of each step, and of the query."""
    own = jax.random.fold_in(key, i)
    return [jax.random.fold_in(own, step) for step in range(steps + 1)]


def by_hand(loss, tx, steps, params, phi, support, keys, adapts=lambda path: True):
    """The inner loop, unrolled."""
    state = tx.init(phi)
    for key in keys[:steps]:
        grads = jax.grad(loss, argnums=1)(params, phi, support, key)
        grads = jax.tree_util.tree_map_with_path(
            lambda path, g: g if adapts(jax.tree_util.keystr(path)) else jnp.zeros_like(g), grads
        )
        updates, state = tx.update(grads, state, phi)
        phi = optax.apply_updates(phi, updates)
    return phi


@contextlib.contextmanager
def doubles():
    """Float64."""
    with jax.enable_x64(True):
        yield


def assert_close(found, wanted, rtol):
    """Each array to within a part of its largest number."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * float(np.abs(b).max()))


def bits(tree):
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(raw(leaf)).tobytes() for leaf in jax.tree.leaves(tree)]
