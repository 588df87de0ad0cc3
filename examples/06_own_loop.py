"""A training loop of your own, twice.

What differs from 05: no `train_step`. The first loop is jitted as a whole and its phi and optimizer
state are donated; the second keeps one tree `{'params': θ, 'phi': φ}`, as some trainers want, and
`masked_optimizer` leaves θ alone in it.
"""

import functools

import jax
import jax.numpy as jnp
import optax

import peftjax as pj

KEY = jax.random.key(0)


def model(params, x):
    return jnp.tanh(x @ params['up']['kernel']) @ params['down']['kernel']


def loss_fn(params, phi, x, y):
    return jnp.mean((forward(params, phi, x) - y) ** 2)


params = {
    'up': {'kernel': jax.random.normal(KEY, (8, 32)) / 8**0.5},
    'down': {'kernel': jax.random.normal(KEY, (32, 4)) / 32**0.5},
}
x = jax.random.normal(jax.random.key(1), (64, 8))
y = jax.random.normal(jax.random.key(2), (64, 4))
peft = pj.attach(pj.Dora(rank=4, target='up|down'), model, params, x)
forward = peft.wrap(model)


@functools.partial(jax.jit, static_argnames='steps', donate_argnames=('phi', 'state'))
def loop(params, phi, state, x, y, steps):
    def step(carry, _):
        phi, state = carry
        loss, grads = jax.value_and_grad(loss_fn, argnums=1)(params, phi, x, y)
        updates, state = tx.update(grads, state, phi)
        return (optax.apply_updates(phi, updates), state), loss

    (phi, state), losses = jax.lax.scan(step, (phi, state), length=steps)
    return phi, state, losses


tx = optax.adamw(1e-2)
phi = jax.jit(peft.init)(KEY, params)
first = jax.tree.leaves(phi)[0]
phi, state, losses = loop(params, phi, tx.init(phi), x, y, steps=100)
print(f'one program: loss {losses[0]:.3f} -> {losses[-1]:.3f}')
print(f'the first phi was given away: {first.is_deleted()}')
assert losses[-1] < losses[0] / 2 and first.is_deleted()

tree = {'params': params, 'phi': peft.init(KEY, params)}
masked = pj.masked_optimizer(tx)
state = masked.init(tree)


@jax.jit
def update(tree, state):
    grads = jax.grad(lambda tree: loss_fn(tree['params'], tree['phi'], x, y))(tree)
    updates, state = masked.update(grads, state, tree)
    return optax.apply_updates(tree, updates), state


for _ in range(100):
    tree, state = update(tree, state)
loss = loss_fn(tree['params'], tree['phi'], x, y)
kept = jax.tree.map(lambda a, b: bool((a == b).all()), params, tree['params'])
print(f'one tree: loss {loss:.3f}; the parameters are as they were: {all(jax.tree.leaves(kept))}')
assert jnp.isclose(loss, losses[-1], rtol=0.1) and all(jax.tree.leaves(kept))
assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 3 * peft.count()
