"""phi in code that knows nothing of peftjax, and many of them at once.

What differs from 06: phi is saved, read back with Orbax alone, and used as what it is: plain
arrays, `w + scale * a @ b`. Before that a stack of phi, one for each task, is trained by one
`jax.vmap` over phi and the data.
"""

import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import peftjax as pj

TASKS, KEY = 3, jax.random.key(0)


def model(params, x):
    return x @ params['layer']['kernel']


def foreign(folder, w, x):
    """A LoRA applied by code that reads JSON and Orbax."""
    (field,) = json.loads((folder / 'adapter.json').read_text())['peft']['Peft']['method'].values()
    with ocp.StandardCheckpointer() as checkpointer:
        phi = checkpointer.restore(folder / 'phi')
    a, b = phi['layer/kernel/a'], phi['layer/kernel/b']
    return x @ (w + field['alpha'] / field['rank'] * a @ b)


params = {'layer': {'kernel': jax.random.normal(KEY, (8, 5))}}
x = jax.random.normal(jax.random.key(1), (TASKS, 64, 8))
targets = jax.random.normal(jax.random.key(2), (TASKS, 64, 5))
peft = pj.attach(pj.Lora(rank=2, alpha=6.0, target='kernel'), model, params, x[0])
forward = peft.wrap(model)
tx = optax.adam(1e-2)


@jax.jit
def fit(params, phi, x, y):
    def step(carry, _):
        phi, state = carry
        loss = lambda phi: jnp.mean((forward(params, phi, x) - y) ** 2)
        value, grads = jax.value_and_grad(loss)(phi)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(phi, updates), state), value

    (phi, _), losses = jax.lax.scan(step, (phi, tx.init(phi)), length=200)
    return phi, losses


keys = jax.random.split(KEY, TASKS)
phis = jax.vmap(peft.init, in_axes=(0, None))(keys, params)
phis, losses = jax.vmap(fit, in_axes=(None, 0, 0, 0))(params, phis, x, targets)
print('one stack of phi:', jax.tree.map(jnp.shape, phis))
print('losses of the tasks:', losses[:, 0].round(2), '->', losses[:, -1].round(2))
assert (losses[:, -1] < losses[:, 0] / 2).all()

third = jax.tree.map(lambda leaf: leaf[2], phis)
alone, _ = fit(params, peft.init(keys[2], params), x[2], targets[2])
same = jax.tree.map(lambda a, b: bool(jnp.allclose(a, b, atol=1e-5)), third, alone)
print('the third is what it would be alone:', all(jax.tree.leaves(same)))
assert all(jax.tree.leaves(same))

with tempfile.TemporaryDirectory() as root:
    folder = pj.save(pathlib.Path(root) / 'third', peft, third, params=params)
    found = foreign(folder, params['layer']['kernel'], x[2])
error = jnp.abs(found - forward(params, third, x[2])).max()
print(f'read by other code: the same outputs, up to {error:.1e}')
assert error < 1e-5
