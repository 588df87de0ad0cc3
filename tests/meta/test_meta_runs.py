"""Runs of a meta-algorithm by the library's own trainer: taken up anywhere, over devices."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
import small
from cases import first_everywhere
from jax.sharding import AxisType

import peftjax as pj
from peftjax import data
from peftjax._collectives import collectives

KEY, TASKS, STEPS = jax.random.key(3), 10, 2
NAMES = np.repeat(np.arange(8), 9)
X = np.random.default_rng(0).normal(size=(72, small.WIDTH)).astype(np.float32)
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
SGD = optax.sgd(0.2, momentum=0.5)


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion('standard'):  # of optax
        yield


LEARNERS = {
    'maml': lambda loss: pj.meta.maml(loss, SGD, steps=STEPS),
    'fomaml': lambda loss: pj.meta.maml(loss, SGD, steps=STEPS, first_order=True),
    'anil': lambda loss: pj.meta.maml(loss, SGD, steps=STEPS, target='head'),
    'reptile': lambda loss: pj.meta.reptile(loss, SGD, steps=STEPS),
    'meta_sgd': lambda loss: pj.meta.meta_sgd(loss, rate=0.1, steps=STEPS),
    'imaml': lambda loss: pj.meta.imaml(loss, SGD, steps=4, strength=2.0, solver_steps=3),
}


def episodes(tasks=TASKS):
    return data.Episodes(
        NAMES, ways=small.WAYS, shots=2, queries=3, tasks=tasks, seed=5, rows=lambda i: X[i]
    )


def setting(name):
    params, phi, loss = small.make()
    learner = LEARNERS[name](loss)
    peft = pj.attach(small.METHODS['lora'], small.model, params, small.drawn(4, 6, small.WIDTH))
    fresh = lambda: pj.start(TX, jax.tree.map(jnp.copy, learner.init(phi)), jax.random.key(1))
    return params, peft, learner, fresh


@contextlib.contextmanager
def cut_off_in(step, at):
    """A step that is begun, and whose process then ends."""

    def made(params, state, batch):
        if int(state.step) == at:
            step(params, jax.tree.map(jnp.copy, state), batch)
            raise KeyboardInterrupt
        return step(params, state, batch)

    with pytest.raises(KeyboardInterrupt):
        yield made


@pytest.mark.slow
@pytest.mark.parametrize('name', ['maml', 'reptile', 'meta_sgd', 'imaml'])
def test_a_run_cut_off_inside_an_outer_step_goes_on_bit_for_bit(name, tmp_path):
    params, peft, learner, fresh = setting(name)
    step = pj.train_step(learner.loss, TX)
    losses = {}
    note = lambda count, loss: losses.setdefault(count, []).append(loss)

    def run(folder, step, steps):
        batches = episodes()
        with pj.Checkpoints(tmp_path / folder, peft, params) as checkpoints:
            state = checkpoints.resume(fresh(), batches)
            begun = int(state.step)
            state = pj.fit(
                step, params, state, batches, steps=steps, checkpoints=checkpoints, save_every=2,
                on_loss=note, fetch_every=1,
            )  # fmt: skip
            return begun, state, batches.state()

    with cut_off_in(step, 5) as dying:
        run('cut', dying, 7)
    begun, again, stood = run('cut', step, 7)
    _, unbroken, wanted = run('whole', step, 7)
    assert begun == 4 and stood == wanted == {**wanted, 'next': 7}
    assert small.bits(again) == small.bits(unbroken) != small.bits(fresh())
    assert int(again.skipped) == 0
    assert sorted(losses) == list(range(1, 8))
    assert all(len(set(each)) == 1 and len(each) > 1 for each in losses.values())


@pytest.mark.slow
def test_accumulated_tasks_are_as_all_at_once_where_nothing_is_drawn():
    params, phi, noisy = small.make()
    still = lambda params, phi, batch, key: noisy(params, phi, batch, KEY)
    learner = LEARNERS['maml'](still)
    whole = next(episodes(4))
    parts = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), whole)
    run = lambda batch, **how: pj.train_step(learner.loss, TX, **how)(
        params, pj.start(TX, jax.tree.map(jnp.copy, phi), jax.random.key(1)), batch
    )
    wanted, found = run(whole), run(parts, accumulate=2)
    small.assert_close(found[0].phi, wanted[0].phi, 1e-5)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-6)


def sum_of_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


AGAIN = {
    'anil': lambda phi: STEPS * sum_of_bytes(phi['up/kernel']),
    'meta_sgd': lambda phi: (STEPS - 1) * sum_of_bytes(phi['rates']),
}
"""Bytes beyond one sum: of what all steps of a task share, the gradient is summed at each use."""


def rates_together(found):
    """The gradients of learned rates as one array: each is a sum that may cancel, and is as exact
    as the largest of them."""
    loss, grads = found
    if 'rates' not in grads:
        return found
    return loss, {**grads, 'rates': jnp.stack(jax.tree.leaves(grads['rates']))}


@pytest.mark.skipif(jax.device_count() < 8, reason='needs eight devices')
@pytest.mark.parametrize(
    ('name', 'kind'),
    first_everywhere(
        [*((name, AxisType.Auto) for name in LEARNERS)]
        + [(name, AxisType.Explicit) for name in ('maml', 'fomaml', 'imaml')]
    ),
)
def test_tasks_over_devices_have_the_numbers_of_one_and_sum_the_gradient_alone(name, kind):
    params, _, learner, fresh = setting(name)
    batch = next(episodes(8))
    run = jax.value_and_grad(learner.loss, argnums=1)
    wanted = quick.jit(run)(params, fresh().phi, batch, KEY)
    mesh = jax.make_mesh((8,), ('data',), axis_types=(kind,))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh):
        there, phi, key = jax.device_put((params, fresh().phi, KEY), whole)
        tasks = jax.device_put(batch, pj.sharding.batch_sharding(mesh))
        compiled = quick.jit(run, out_shardings=whole).lower(there, phi, tasks, key).compile()
        found = compiled(there, phi, tasks, key)
    small.assert_close(rates_together(found), rates_together(wanted), 1e-6)
    sent, loss = collectives(compiled.as_text()), 4
    assert {each.operation for each in sent} == {'all-reduce'}
    again = AGAIN.get(name, lambda phi: 0)(phi)
    assert sum(each.nbytes for each in sent) == sum_of_bytes(phi) + loss + again
