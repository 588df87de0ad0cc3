"""Eight devices, twice: `jax.pmap`, and `jax.jit` with shardings (pjit).

What differs from 09: one step, on many devices. Under `pmap` each device runs it on its rows, with
theta and phi whole, and the step says what is averaged over devices. Under `jit` it is the step of
one device: arrays say where they lie, theta and phi in parts, and the compiler finds what must be
sent. The losses are the same.
"""

import functools
import os

os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import peftjax as pj

KEY, STEPS, DEVICES = jax.random.key(3), 12, 8


def model(params, x):
    return x + jnp.tanh(x @ params['up']['kernel']) @ params['down']['kernel']


def loss_fn(params, phi, x, y):
    return jnp.mean((forward(params, phi, x) - y) ** 2)


params = {
    'up': {'kernel': jax.random.normal(jax.random.key(0), (8, 32)) / 8**0.5},
    'down': {'kernel': jax.random.normal(jax.random.key(1), (32, 8)) / 32**0.5},
}
x, y = jax.random.normal(jax.random.key(2), (2, 64, 8))
peft = pj.attach(pj.Lora(rank=4, target='up|down'), model, params, x)
forward = peft.wrap(model)
tx = optax.adam(2e-2)


def step(params, phi, state, x, y, over_devices=lambda tree: tree):
    loss, grads = jax.value_and_grad(loss_fn, argnums=1)(params, phi, x, y)
    loss, grads = over_devices((loss, grads))
    updates, state = tx.update(grads, state, phi)
    return optax.apply_updates(phi, updates), state, loss


def with_pmap(params, x, y):
    mean = functools.partial(jax.lax.pmean, axis_name='data')
    mapped = jax.pmap(
        functools.partial(step, over_devices=mean),
        axis_name='data',
        in_axes=(None, None, None, 0, 0),  # whole on every device, but for the rows
        out_axes=None,
    )
    x, y = (rows.reshape(DEVICES, -1, *rows.shape[1:]) for rows in (x, y))
    phi = peft.init(KEY, params)
    state = tx.init(phi)
    for _ in range(STEPS):
        phi, state, loss = mapped(params, phi, state, x, y)
        yield float(loss)


def with_pjit(params, x, y):
    mesh = jax.make_mesh((4, 2), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)
    rules = (('up/kernel', P(None, 'model')), ('down/kernel', P('model', None)))
    params = jax.device_put(params, pj.sharding.by_path(rules, mesh, params))
    x, y = jax.device_put((x, y), pj.sharding.batch_sharding(mesh))
    phi = peft.init(KEY, params)  # beside theta, in parts as it is
    state = tx.init(phi)
    jitted = jax.jit(step)
    for _ in range(STEPS):
        phi, state, loss = jitted(params, phi, state, x, y)
        yield float(loss)


losses = list(zip(with_pmap(params, x, y), with_pjit(params, x, y), strict=True))
print('step  pmap      pjit')
for i, (mapped, sharded) in enumerate(losses):
    print(f'{i:4}  {mapped:.6f}  {sharded:.6f}')
    assert abs(mapped - sharded) < 1e-5 * sharded
assert losses[-1][0] < 0.7 * losses[0][0]
