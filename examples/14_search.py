"""A search in one program: eight learning rates times three ranks, the best one by validation.

What differs from 13: a rate is data, since `optax.inject_hyperparams` keeps it in the state; ranks
are padded to the largest by `pj.pad_ranks`, each with its own scale, which is frozen and so stands
beside theta. All 24 members train on the same batches.
"""

import itertools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peftjax as pj

RATES, RANKS, STEPS = np.geomspace(1e-4, 1.0, 8), (1, 2, 6), 150
CASES = [*itertools.product(RANKS, RATES.tolist())]
draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)


def model(params, x):
    return jnp.tanh(x @ params['up']['kernel']) @ params['down']['kernel']


# the task is the model with an update of rank two; few examples, and noise on them
params = {'up': {'kernel': draw(0, 24, 32) / 5}, 'down': {'kernel': draw(1, 32, 8) / 6}}
truth = {'up': {'kernel': params['up']['kernel'] + draw(2, 24, 2) @ draw(3, 2, 32) / 6}}
x = draw(4, 192, 24)
y = model({**params, **truth}, x) + 0.3 * draw(5, 192, 8)
train, valid = (x[:64], y[:64]), (x[64:], y[64:])

method = lambda rank: pj.Lora(rank=rank, alpha=4, target='up')
plans = {rank: pj.attach(method(rank), model, params, x) for rank in RANKS}
padded = pj.pad_ranks([plans[rank] for rank, _ in CASES])
forward = padded.peft.wrap(model)
adam = lambda rate: optax.inject_hyperparams(optax.adam)(learning_rate=rate)


def loss_fn(frozen, phi, batch, key):
    params, scale = frozen
    x, y = batch
    return jnp.mean((forward(params, padded.scaled(phi, scale), x) - y) ** 2)


start = lambda phi, rate: pj.start(adam(rate), phi, jax.random.key(6))
phis = padded.pad([peft.init(jax.random.key(7), params) for peft in padded.members])
states = jax.vmap(start)(phis, jnp.array([rate for _, rate in CASES]))
frozen, over = (params, padded.scales), (None, 0)
step = jax.jit(jax.vmap(pj.train_step(loss_fn, adam(0.0)), in_axes=(over, 0, None)))
for _ in range(STEPS):
    states, losses = step(frozen, states, train)

judge = jax.jit(jax.vmap(loss_fn, in_axes=(over, 0, None, None)))
found = judge(frozen, states.phi, valid, None).reshape(len(RANKS), len(RATES))
print('rank \\ rate', *(f'{rate:8.0e}' for rate in RATES))
for rank, row in zip(RANKS, found, strict=True):
    print(f'{rank:11}', *(f'{value:8.3f}' for value in row))
best = int(found.argmin())
rank, rate = CASES[best]
print(f'best: rank {rank}, rate {rate:.0e}; by the loss of training: {CASES[int(losses.argmin())]}')

phi = padded.cut(states.phi)[best]  # unpadded: an adapter as any other
with tempfile.TemporaryDirectory() as root:
    pj.save(pathlib.Path(root) / 'best', plans[rank], phi, params=params)
    loaded = pj.load(pathlib.Path(root) / 'best', params=params)
out = loaded.peft.wrap(model)(params, loaded.phi, valid[0])
again = jnp.mean((out - valid[1]) ** 2)
base = jnp.mean((model(params, valid[0]) - valid[1]) ** 2)
print(f'saved and loaded: {again:.3f} on validation, the base {base:.3f}, the noise 0.090')
assert jnp.isclose(again, found.min(), rtol=1e-4) and again < base / 2
