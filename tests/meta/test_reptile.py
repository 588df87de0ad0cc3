"""Reptile against its definition, in float64."""

import jax
import jax.numpy as jnp
import optax
import pytest
import quick
import small

import peftjax as pj

KEY, STEPS = jax.random.key(7), 3


@pytest.mark.parametrize('target', [None, 'head'])
def test_phi_moves_towards_the_mean_of_where_the_loops_end(target):
    with small.doubles(), jax.numpy_dtype_promotion('standard'):  # of optax
        params, phi, loss = small.make('chain')
        tasks, tx = small.tasks(), optax.adam(0.05)  # no eps_root: not differentiated through
        adapts = lambda path: target is None or target in path

        @quick.jit
        def by_hand(params, phi, task, keys):
            support, query = task
            own = small.by_hand(loss, tx, STEPS, params, phi, support, keys, adapts)
            return loss(params, own, query, keys[-1]), own

        each = [
            by_hand(params, phi, small.task(tasks, i), small.keys_of(KEY, i, STEPS))
            for i in range(small.TASKS)
        ]
        value, mean = jax.tree.map(lambda *x: sum(x) / small.TASKS, *each)
        wanted = jax.tree.map(lambda start, end: start + 0.25 * (end - start), phi, mean)

        learner, outer = pj.meta.reptile(loss, tx, steps=STEPS, target=target), optax.sgd(0.25)
        # a step folds its number into the key: here all draw from the same
        step = pj.train_step(
            lambda params, phi, tasks, _: learner.loss(params, phi, tasks, KEY), outer
        )
        start = jax.tree.map(jnp.copy, learner.init(phi))
        state = pj.start(outer, start, jax.random.key(1))
        state, found = step(params, state, tasks)
        small.assert_close((found, dict(state.phi)), (value, dict(wanted)), 1e-12)


def test_one_step_is_refused():
    with pytest.raises(ValueError, match='at least 2 steps: received 1. After one'):
        pj.meta.reptile(lambda params, phi, batch, key: 0.0, optax.sgd(0.1), steps=1)
