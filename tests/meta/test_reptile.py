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


@pytest.mark.slow
@pytest.mark.parametrize('target', [None, 'head'])
def test_the_state_of_the_inner_optimizer_is_handed_on(target):
    with small.doubles(), jax.numpy_dtype_promotion('standard'):  # of optax
        params, phi, loss = small.make('chain')
        tasks, tx = small.tasks(), optax.adam(0.05)
        adapts = lambda path: target is None or target in jax.tree_util.keystr(path)

        @quick.jit
        def by_hand(params, phi, state, task, keys):
            support, query = task
            for key in keys[:-1]:
                grads = jax.grad(loss, argnums=1)(params, phi, support, key)
                updates, state = tx.update(grads, state)
                phi = jax.tree_util.tree_map_with_path(
                    lambda path, x, u: x + u if adapts(path) else x, phi, updates
                )
            return loss(params, phi, query, keys[-1]), phi, state

        wanted, state = phi, tx.init(phi)
        for _ in range(2):  # the second begins where the first has come to
            each = [
                by_hand(params, wanted, state, small.task(tasks, i), small.keys_of(KEY, i, STEPS))
                for i in range(small.TASKS)
            ]
            same = lambda *x: (sum(x) / small.TASKS).astype(jnp.asarray(x[0]).dtype)
            value, mean, state = jax.tree.map(same, *each)
            wanted = jax.tree.map(lambda start, end: start + 0.25 * (end - start), wanted, mean)

        learner = pj.meta.reptile(loss, tx, steps=STEPS, target=target, carry=True)
        outer = pj.chain_optimizer({'phi': optax.sgd(0.25), 'inner': optax.sgd(1.0)})
        step = pj.train_step(
            lambda params, phi, tasks, _: learner.loss(params, phi, tasks, KEY), outer
        )
        own = pj.start(outer, jax.tree.map(jnp.copy, learner.init(phi)), jax.random.key(1))
        found = 0.0
        for _ in range(2):
            own, found = step(params, own, tasks)
        small.assert_close((found, own.phi['phi']), (value, dict(wanted)), 1e-12)
        assert float(own.phi['inner'][0]) == 2 * STEPS == float(state[0].count)

        support, keys = small.task(tasks, 0)[0], small.keys_of(KEY, 0, STEPS)
        _, ended, _ = by_hand(params, wanted, state, (support, support), keys)
        adapted = learner.adapt(params, own.phi, support, jax.random.fold_in(KEY, 0))
        small.assert_close(dict(adapted), dict(ended), 1e-12)


def test_counts_of_the_inner_optimizer_stay_whole():
    """A float32 mean over 41 tasks is a rounding away from what all of them have."""
    loss = lambda params, phi, batch, key: ((phi['a'] - batch) ** 2).sum()
    learner = pj.meta.reptile(loss, optax.adam(0.1), steps=STEPS, carry=True)
    outer, rows = optax.sgd(1.0), small.drawn(0, 41, 2).astype(jnp.float32)
    step = pj.train_step(learner.loss, outer)
    with jax.numpy_dtype_promotion('standard'):  # of optax
        state = pj.start(outer, learner.init({'a': jnp.ones(2)}), KEY)
        for taken in range(1, 5):
            state, _ = step({}, state, (rows, rows))
            count = float(state.phi['inner'][0])
            assert count == pytest.approx(taken * STEPS, rel=1e-6)


@pytest.mark.parametrize(
    'learner',
    [
        pj.meta.reptile(lambda *_: 0.0, optax.adam(0.1), steps=2, carry=True),
        pj.meta.meta_sgd(lambda *_: 0.0, rate=0.1),
    ],
    ids=['reptile', 'meta_sgd'],
)
def test_a_phi_that_did_not_begin_with_init_is_refused(learner):
    tasks, phi = (jnp.ones((1, 2)), jnp.ones((1, 2))), {'a': jnp.ones(1)}
    with pytest.raises(ValueError, match=r"received \['a'\]. Begin with learner.init"):
        learner.loss({}, phi, tasks, KEY)
    with pytest.raises(ValueError, match=r"received \['a'\]. Begin with learner.init"):
        learner.adapt({}, phi, jnp.ones(2), KEY)


def test_a_state_is_not_handed_on_for_what_only_a_task_has():
    with pytest.raises(ValueError, match='carry goes without begin'):
        pj.meta.reptile(
            lambda params, phi, batch, key: 0.0,
            optax.sgd(0.1),
            steps=2,
            begin=lambda *_: {},
            carry=True,
        )


def test_a_state_of_another_learner_or_of_one_that_draws_is_refused():
    loss, phi = (lambda *_: jnp.zeros(())), {'a': jnp.ones(1)}
    of = lambda tx: pj.meta.reptile(loss, tx, steps=2, carry=True)
    with pytest.raises(ValueError, match=r'leaves of shapes .*: received \[\]'):
        of(optax.adam(0.1)).adapt({}, of(optax.sgd(0.1)).init(phi), jnp.ones(2), KEY)
    with pytest.raises(TypeError, match='no mean of keys'):
        of(optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1))).init(phi)


def test_one_step_is_refused():
    with pytest.raises(TypeError, match="steps must be an integer: received '2'"):
        pj.meta.reptile(None, optax.sgd(0.1), steps='2')
    with pytest.raises(ValueError, match='at least 2 steps: received 1. After one'):
        pj.meta.reptile(lambda params, phi, batch, key: 0.0, optax.sgd(0.1), steps=1)
