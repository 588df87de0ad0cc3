"""LoRA on a Flax (linen) module.

What differs from 01: the apply function is `module.apply`, with dropout that needs a random key,
and the plan is made by `attach`, so that the same phi serves the model and its loss.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import peftjax as pj


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(64, name='up')(x))
        x = nn.relu(nn.Dense(64, name='middle')(x))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(2, name='head')(x)


def loss_fn(params, x, y, **how):
    logits = module.apply(params, x, **how)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


module, key = Classifier(), jax.random.key(0)
x = jax.random.normal(jax.random.key(1), (256, 8))
y = (x[:, 0] * x[:, 1] > 0).astype(jnp.int32)
params = module.init(key, x)

method = pj.chain(
    pj.Lora(rank=4, alpha=8, target='(up|middle)/kernel'), pj.Trainable(target='head')
)
peft = pj.attach(method, module.apply, params, x)
print(peft)
phi = peft.init(key, params)
loss = peft.wrap(loss_fn)  # any function of the same parameters


def training_loss(params, phi, batch, key):
    return loss(params, phi, *batch, train=True, rngs={'dropout': key})


tx = optax.adam(1e-2)
step, state = pj.train_step(training_loss, tx), pj.start(tx, phi, key)
for _ in range(300):
    state, _ = step(params, state, (x, y))

forward = jax.jit(peft.wrap(module.apply))
accuracy = jnp.mean(forward(params, state.phi, x).argmax(-1) == y)
print(f'accuracy: {jnp.mean(module.apply(params, x).argmax(-1) == y):.2f} -> {accuracy:.2f}')
assert accuracy > 0.9

merged = peft.merge(params, state.phi)
assert jnp.allclose(module.apply(merged, x), forward(params, state.phi, x), atol=1e-4)
print('merged:', jax.tree.map(jnp.shape, merged['params']['head']))
