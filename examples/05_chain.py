"""Several methods at once, each with an optimizer of its own.

What differs from 04: a bottleneck adapter joins, which has no place in the weights: `merge` refuses
the whole chain, and says why. phi has one key for each method, and so has `chain_optimizer`.
"""

import jax
import jax.numpy as jnp
import optax

import peftjax as pj

SIZES = {'embed': (10, 16), 'up': (16, 32), 'down': (32, 16), 'head': (16, 10)}
KEY = jax.random.key(0)

params = {
    name: {'kernel': jax.random.normal(jax.random.fold_in(KEY, i), size) / size[0] ** 0.5}
    for i, (name, size) in enumerate(SIZES.items())
}


def model(params, ids):
    embed, up, down, head = (params[name]['kernel'] for name in SIZES)
    x = embed[ids]
    return (x + jax.nn.gelu(x @ up) @ down) @ head


ids = jnp.arange(10)
labels = (ids + 3) % 10  # the task: count three on

method = pj.chain(
    pj.Lora(rank=4, target='up'),
    pj.Adapter(target='down', reduction=4),
    head=pj.Trainable(target='head'),
)
peft = pj.attach(method, model, params, ids)
print(peft)
phi = peft.init(KEY, params)
assert list(phi) == ['lora', 'adapter', 'head']

slow, fast = optax.adam(1e-3), optax.adamw(1e-2, weight_decay=1e-3)
tx = pj.chain_optimizer({'lora': fast, 'adapter': fast, 'head': slow})
loss = peft.wrap(
    lambda params, ids: optax.softmax_cross_entropy_with_integer_labels(
        model(params, ids), labels
    ).mean()
)
step = pj.train_step(lambda params, phi, ids, key: loss(params, phi, ids), tx)
state = pj.start(tx, phi, KEY)
for _ in range(200):
    state, _ = step(params, state, ids)

right = lambda logits: int((logits.argmax(-1) == labels).sum())
forward = jax.jit(peft.wrap(model))
before, after = right(model(params, ids)), right(forward(params, state.phi, ids))
print(f'right before: {before} of 10, after: {after}')
assert after == 10

try:
    peft.merge(params, state.phi)
except ValueError as error:
    print(f'merge: {error}')
else:
    raise AssertionError('an adapter must not merge')
