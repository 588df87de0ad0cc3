"""LoRA on a plain function: the three laws on one page.

The model is a function and a dict of arrays; no framework is needed.
"""

import jax
import jax.numpy as jnp
import optax

import peftjax as pj

KEY = jax.random.key(0)


def model(params, x):
    hidden = jnp.tanh(x @ params['up']['kernel'] + params['up']['bias'])
    return hidden @ params['down']['kernel']


def loss_fn(params, phi, batch, key):
    x, y = batch
    return jnp.mean((forward(params, phi, x) - y) ** 2)


params = {
    'up': {'kernel': jax.random.normal(KEY, (8, 32)) / 8**0.5, 'bias': jnp.zeros(32)},
    'down': {'kernel': jax.random.normal(KEY, (32, 1)) / 32**0.5},
}
x = jax.random.normal(jax.random.key(1), (256, 8))
y = model(params, x) + jnp.sin(x[:, :1])  # the new task: the old one, and something more

forward, phi = pj.lora_wrap(model, params, x, key=KEY, rank=4, target='up/kernel')
print(forward.peft)
assert (forward(params, phi, x) == model(params, x)).all(), 'law 1: it starts as the model'

tx = optax.adam(1e-2)
step, state = pj.train_step(loss_fn, tx), pj.start(tx, phi, KEY)
before = jax.tree.map(jnp.copy, params)
losses = []
for _ in range(300):
    state, loss = step(params, state, (x, y))
    losses.append(float(loss))
print(f'loss: {losses[0]:.3f} -> {losses[-1]:.3f}')
assert losses[-1] < losses[0] / 4

merged = forward.peft.merge(params, state.phi)
error = jnp.abs(model(merged, x) - forward(params, state.phi, x)).max()
print(f'law 2: the merged model is the same function, up to {error:.1e}')
assert error < 1e-5

same = jax.tree.map(lambda a, b: bool((a == b).all()), before, params)
print(f'law 3: no parameter has changed: {all(jax.tree.leaves(same))}')
assert all(jax.tree.leaves(same))
