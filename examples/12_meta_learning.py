"""MAML over LoRA: a start from which a few steps on five examples suffice.

What differs from 11: `train_step` gets the loss of `meta.maml`, over tasks instead of examples, and
differentiates through the inner steps. Everything else of a training stays as it was. A task here
is a sine of its own amplitude and phase; theta is a network that was never trained. For tasks of
labelled data see `peftjax.data.Episodes`, which also says where it stands, as checkpoints need.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peftjax as pj

SHOTS, QUERIES, TASKS, INNER_STEPS, OUTER_STEPS = 5, 10, 25, 3, 1500


def model(params, x):
    for name in ('first', 'second'):
        x = jnp.tanh(x @ params[name]['kernel'] + params[name]['bias'])
    return x @ params['last']['kernel'] + params['last']['bias']


def sines(rng, count):
    """Tasks: `(support, query)`, each `(x, y)` of shape `(tasks, rows, 1)`."""
    amplitude, phase = rng.uniform(0.5, 2, (count, 1, 1)), rng.uniform(0, np.pi, (count, 1, 1))
    x = rng.uniform(-3, 3, (count, SHOTS + QUERIES, 1))
    both = [a.astype(np.float32) for a in (x, amplitude * np.sin(x + phase))]
    return tuple(a[:, :SHOTS] for a in both), tuple(a[:, SHOTS:] for a in both)


def layer(i, rows, columns):
    kernel = jax.random.normal(jax.random.key(i), (rows, columns)) / rows**0.5
    return {'kernel': kernel, 'bias': jnp.linspace(-1, 1, columns)}


params = {'first': layer(0, 1, 40), 'second': layer(1, 40, 40), 'last': layer(2, 40, 1)}
method = pj.chain(
    lora=pj.Lora(rank=4, target='second/kernel'), head=pj.Trainable(target=('bias', 'last'))
)
forward, phi = pj.method_wrap(method, model, params, jnp.ones((5, 1)), key=jax.random.key(3))


def loss_fn(params, phi, batch, key):
    del key  # nothing is drawn
    x, y = batch
    return ((forward(params, phi, x) - y) ** 2).mean()


# the learner: what is trained, its loss over tasks, and how it adapts to one
learner = pj.meta.maml(loss_fn, optax.sgd(0.05), steps=INNER_STEPS)
tx, losses = optax.adam(1e-2), []
step = pj.train_step(learner.loss, tx)
state = pj.start(tx, jax.tree.map(jnp.copy, learner.init(phi)), jax.random.key(4))
rng = np.random.default_rng(0)
batches = (sines(rng, TASKS) for _ in range(OUTER_STEPS))
note = lambda _, loss: losses.append(loss)
state = pj.fit(step, params, state, batches, steps=OUTER_STEPS, on_loss=note)


@jax.jit
def judged(params, phi, tasks, keys):
    """The mean loss of queries, after adapting to each task's support alone."""
    support, query = tasks
    own = jax.vmap(learner.adapt, (None, None, 0, 0))(params, phi, support, keys)
    return jax.vmap(loss_fn, (None, 0, 0, 0))(params, own, query, keys).mean()


new, keys = sines(np.random.default_rng(1), 200), jax.random.split(jax.random.key(5), 200)
before, after = (float(judged(params, own, new, keys)) for own in (phi, state.phi))
print(f'loss over tasks while trained: {np.mean(losses[:20]):.3f} -> {np.mean(losses[-20:]):.3f}')
print(f'new tasks after {INNER_STEPS} steps on {SHOTS} examples: {before:.3f} -> {after:.3f}')
print(f'phi: {forward.peft.count()} numbers, the same for all tasks; theta is as it was')
assert after < before / 3
