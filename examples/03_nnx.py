"""IA3 on a Flax NNX model.

What differs from 02: the model is an object. `nnx.split` takes it apart into a graph and its
parameters, the apply function puts it together again, and `nnx.update` gives the object the merged
parameters at the end.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import peftjax as pj


class Model(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(4, 32, rngs=rngs)
        self.down = nnx.Linear(32, 3, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


model = Model(nnx.Rngs(0))
graph, params, rest = nnx.split(model, nnx.Param, ...)


def apply_fn(params, x):
    return nnx.merge(graph, params, rest)(x)


x = jax.random.normal(jax.random.key(1), (128, 4))
y = model(x) * jnp.array([2.0, 0.5, -1.0]) + 1.0  # other scales: what IA3 can learn

peft = pj.attach(pj.Ia3(target='(up|down)/kernel'), apply_fn, params, x)
print(peft)
phi = peft.init(jax.random.key(2), params)
forward = jax.jit(peft.wrap(apply_fn))
assert (forward(params, phi, x) == jax.jit(apply_fn)(params, x)).all()

loss_fn = lambda params, phi, batch, key: jnp.mean((forward(params, phi, batch[0]) - batch[1]) ** 2)
tx = optax.adam(3e-2)
step, state = pj.train_step(loss_fn, tx), pj.start(tx, phi, jax.random.key(3))
losses = []
for _ in range(300):
    state, loss = step(params, state, (x, y))
    losses.append(float(loss))
print(f'loss: {losses[0]:.3f} -> {losses[-1]:.3f}')
assert losses[-1] < losses[0] / 2

tuned = forward(params, state.phi, x)
nnx.update(model, peft.merge(params, state.phi))  # `params` has the same variables: it changes too
error = float(jnp.abs(model(x) - tuned).max())
print(f'the object now is the tuned model, up to {error:.1e}')
assert error < 1e-4
