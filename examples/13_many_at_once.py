"""Six adapters trained at once: three tasks, two seeds each, one copy of theta.

What differs from 12: states of training are stacked, and `jax.vmap` of an ordinary step updates all
of them. Theta is no part of the stack, so it is held once and meets all members in one product.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import peftjax as pj

TASKS, SEEDS, STEPS = 3, 2, 60


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.gelu(nn.Dense(128)(x))
        return nn.Dense(4)(x)


model = Net()
x = jax.random.normal(jax.random.key(0), (TASKS, 64, 16))
labels = (x[..., :4] * jnp.array([1.0, -1.0, 0.5])[:, None, None]).argmax(-1)
params = model.init(jax.random.key(1), x[0])  # a pretrained model, in earnest

peft = pj.attach(pj.Lora(rank=4, target='kernel'), model.apply, params, x[0])
forward, tx = peft.wrap(model.apply), optax.adamw(3e-3)


def loss_fn(params, phi, batch, key):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(forward(params, phi, x), y).mean()


step = pj.train_step(loss_fn, tx)
keys = jax.random.split(jax.random.key(2), SEEDS * TASKS)
states = [pj.start(tx, peft.init(key, params), key) for key in keys]
batches = jnp.repeat(x, SEEDS, axis=0), jnp.repeat(labels, SEEDS, axis=0)

many = jax.jit(jax.vmap(step, in_axes=(None, 0, 0)), donate_argnums=1)
together = pj.stack(states)
for _ in range(STEPS):
    together, losses = many(params, together, batches)
print('losses, a task in each row:', *losses.reshape(TASKS, SEEDS).round(3))

alone = pj.start(tx, peft.init(keys[3], params), keys[3])
for _ in range(STEPS):
    alone, loss = step(params, alone, (batches[0][3], batches[1][3]))
each = pj.unstack(together)
gap = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), each[3].phi, alone.phi)
print(f'the fourth, trained alone, differs by {max(jax.tree.leaves(gap)):.0e}')

held = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
own = held(together._replace(key=jax.random.key_data(together.key))) // len(each)
print(f'bytes: theta {held(params):,} once, and {own:,} for each of {len(each)}')
assert losses.max() < 0.1 and max(jax.tree.leaves(gap)) < 1e-3
