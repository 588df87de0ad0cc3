"""A run as one leaves it alone: rates by method, an average of phi, the best one, an early end.

What differs from 08: `fit` makes the loop. Each method of a chain has an optimizer, `b` of LoRA a
rate sixteen times that of `a` (LoRA+), and a moving average of phi goes along. It is the average
that is evaluated on data held back; the best one is kept, and where four evaluations in a row find
nothing better the run ends. It is cut off on the way, and goes on.
"""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peftjax as pj

KEY = jax.random.key(0)
params = {
    'up': {'kernel': jax.random.normal(KEY, (16, 64)) / 4},
    'head': {'kernel': jnp.zeros((64, 2)), 'bias': jnp.zeros(2)},
}


def model(params, x):
    hidden = jnp.tanh(x @ params['up']['kernel'])
    return hidden @ params['head']['kernel'] + params['head']['bias']


rows = np.random.default_rng(0)
x = rows.normal(size=(1024, 16)).astype(np.float32)
y = (x[:, 0] + x[:, 1] + rows.normal(size=1024) > 0).astype(np.int32)  # with noise to overfit
train, held = (x[:128], y[:128]), (x[128:], y[128:])


class Batches:
    """Eight rows at a time, drawn by how many there were before: it can be taken up anywhere."""

    count = 0

    def __next__(self):
        index = np.random.default_rng(self.count).choice(128, 8, replace=False)
        self.count += 1
        return train[0][index], train[1][index]

    def __iter__(self):
        return self

    def state(self):
        return self.count

    def restore(self, state):
        self.count = state


method = pj.chain(pj.Lora(rank=4, target='up'), head=pj.Trainable(target='head'))
peft = pj.attach(method, model, params, x[:8])
forward = peft.wrap(model)


def loss_fn(params, phi, batch, key=None):
    logits = forward(params, phi, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


each = {'lora': optax.chain(optax.adam(1e-3), pj.lora_plus(16)), 'head': optax.adam(5e-3)}
tx = optax.chain(optax.clip_by_global_norm(1.0), pj.chain_optimizer(each))
tx = pj.moving_average(tx, decay=0.95)
step, held_back = pj.train_step(loss_fn, tx, accumulate=4), jax.jit(loss_fn)
found = {}


def evaluate(step, phi):
    found[step] = float(held_back(params, phi, held))
    return found[step]


def run(folder, steps):
    batches = pj.Stacked(Batches(), 4)  # thirty-two rows a step, eight at a time
    best = pj.KeepBest(evaluate, patience=4, of=pj.averaged)
    with pj.Checkpoints(folder, peft, params) as saved:
        fresh = pj.start(tx, peft.init(KEY, params), KEY, keep_best=True)
        state = saved.resume(fresh, batches)
        events = [pj.Every(10, best)]
        return pj.fit(step, params, state, batches, steps=steps, events=events, checkpoints=saved)


with tempfile.TemporaryDirectory() as folder:
    run(folder, 35)
    state = run(folder, 1000)

best = state.best
print(f'ended after step {state.step}, best after step {best.step}')
print(f'held back: loss {found[10]:.3f}, {best.value:.3f} at best, {found[int(state.step)]:.3f}')
assert int(state.step) == int(best.step) + 40 < 1000
assert np.isclose(held_back(params, best.phi, held), min(found.values()), atol=1e-6)
