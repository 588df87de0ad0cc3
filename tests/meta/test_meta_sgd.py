"""Meta-SGD against the loop written out, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
import small

import peftjax as pj

KEY, STEPS = jax.random.key(7), 2


@pytest.fixture(autouse=True)
def climate():
    with small.doubles(), jax.numpy_dtype_promotion('standard'):  # of optax
        yield


def by_hand(loss, target, params, trained, tasks):
    adapts = lambda path: target is None or target in jax.tree_util.keystr(path)
    found = 0.0
    for i in range(small.TASKS):
        (support, query), phi = small.task(tasks, i), trained['phi']
        keys = small.keys_of(KEY, i, STEPS)
        rates = {
            jax.tree_util.keystr(path): rate
            for path, rate in jax.tree_util.tree_leaves_with_path(trained['rates'])
        }
        for key in keys[:-1]:
            grads = jax.grad(loss, argnums=1)(params, phi, support, key)
            phi = jax.tree_util.tree_map_with_path(
                lambda path, x, g, rates=rates: (
                    x - rates[jax.tree_util.keystr(path)] * g if adapts(path) else x
                ),
                phi,
                grads,
            )
        found += loss(params, phi, query, keys[-1]) / small.TASKS
    return found


@pytest.mark.slow
@pytest.mark.parametrize(('target', 'elementwise'), [(None, False), ('head', True)])
def test_phi_and_rates_have_the_gradient_of_the_unrolled_loop(target, elementwise):
    params, phi, loss = small.make('chain')
    tasks = small.tasks()
    learner = pj.meta.meta_sgd(loss, rate=0.2, steps=STEPS, target=target, elementwise=elementwise)
    trained = learner.init(phi)
    pairs = zip(*map(jax.tree.leaves, (phi['head'], trained['rates']['head'])), strict=True)
    assert all(r.shape == (x.shape if elementwise else ()) and r.dtype == x.dtype for x, r in pairs)
    count = len(jax.tree.leaves(phi if target is None else phi['head']))
    assert len(jax.tree.leaves(trained['rates'])) == count
    run = lambda fn: quick.jit(jax.value_and_grad(fn, argnums=1))(params, trained, tasks)
    found = run(lambda *args: learner.loss(*args, KEY))
    wanted = run(lambda *args: by_hand(loss, target, *args))
    small.assert_close(found, wanted, 1e-12)


def test_rates_are_learned_by_an_optimizer_of_their_own():
    params, phi, loss = small.make()
    learner = pj.meta.meta_sgd(loss, rate=0.0)
    tx = pj.chain_optimizer({'phi': optax.set_to_zero(), 'rates': optax.adam(0.05)})
    step, state = pj.train_step(learner.loss, tx), pj.start(tx, learner.init(phi), KEY)
    losses, tasks = [], small.tasks()
    for _ in range(30):
        state, found = step(params, state, tasks)
        losses.append(float(found))
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.005
    assert all(rate > 0 for rate in jax.tree.leaves(state.phi['rates']))
    own = learner.adapt(params, state.phi, small.task(tasks, 0)[0], KEY)
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, dict(state.phi['phi']))


def test_steps_and_targets_are_checked():
    with pytest.raises(ValueError, match='steps must be at least 1: received 0'):
        pj.meta.meta_sgd(lambda *args: 0.0, rate=0.1, steps=0)
    with pytest.raises(ValueError, match="no leaf matches target='tail'"):
        _, phi, loss = small.make()
        pj.meta.meta_sgd(loss, rate=0.1, target='tail').init(phi)
