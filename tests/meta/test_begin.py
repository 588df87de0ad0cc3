"""What a task begins with beside phi: it adapts, and the gradient goes through it."""

import jax
import jax.numpy as jnp
import optax
import pytest
import quick
import small

import peftjax as pj

KEY, STEPS, RATE = jax.random.key(7), 3, 0.3


@pytest.fixture(autouse=True)
def climate():
    with small.doubles(), jax.numpy_dtype_promotion('standard'):  # of optax
        yield


def shifted():
    """Theta, phi, a loss whose inputs a part of the task's own shifts, and what that begins as."""
    params, phi, plain = small.make()

    def loss(params, phi, batch, key):
        own = {path: value for path, value in phi.items() if path != 'shift'}
        x, labels = batch
        moved = x + phi['shift']['value'] * own['head/kernel']['b'].sum()
        return plain(params, own, (moved, labels), key)

    def begin(params, phi, support, key):
        del params, key
        return {'shift': {'value': support[0].mean(0) * phi['up/kernel']['b'].sum()}}

    return params, phi, loss, begin


def over_tasks(one):
    """The mean of what is found for each task."""
    tasks = small.tasks()
    each = [one(small.task(tasks, i), small.keys_of(KEY, i, STEPS)) for i in range(small.TASKS)]
    return jax.tree.map(lambda *x: sum(x) / small.TASKS, *each)


def ended(loss, begin, params, phi, support, keys):
    """Where the loop ends, by hand."""
    own = {**phi, **begin(params, phi, support, None)}
    return small.by_hand(loss, optax.sgd(RATE), STEPS, params, own, support, keys)


def both(learner, params, phi):
    of = quick.jit(jax.value_and_grad(learner.loss, argnums=1))
    return of(params, phi, small.tasks(), KEY)


def test_the_gradient_of_maml_goes_through_the_beginning():
    params, phi, loss, begin = shifted()

    @quick.jit
    @jax.value_and_grad
    def by_hand(phi, task, keys):
        return loss(params, ended(loss, begin, params, phi, task[0], keys), task[1], keys[-1])

    wanted = over_tasks(lambda *task: by_hand(phi, *task))
    learner = pj.meta.maml(loss, optax.sgd(RATE), steps=STEPS, begin=begin)
    small.assert_close(both(learner, params, phi), wanted, 1e-12)


@pytest.mark.slow
def test_at_first_order_it_goes_through_the_beginning_alone():
    params, phi, loss, begin = shifted()

    @quick.jit
    def by_hand(phi, task, keys):
        of = lambda own: loss(params, own, task[1], keys[-1])
        value, grad = jax.value_and_grad(of)(ended(loss, begin, params, phi, task[0], keys))
        _, back = jax.vjp(lambda phi: begin(params, phi, task[0], None)['shift'], phi)
        (more,) = back(grad['shift'])
        assert all(path in more for path in phi)
        return value, {path: jax.tree.map(jnp.add, grad[path], more[path]) for path in phi}

    wanted = over_tasks(lambda *task: by_hand(phi, *task))
    learner = pj.meta.maml(loss, optax.sgd(RATE), steps=STEPS, first_order=True, begin=begin)
    found = both(learner, params, phi)
    small.assert_close(found, wanted, 1e-12)
    exact = both(pj.meta.maml(loss, optax.sgd(RATE), steps=STEPS, begin=begin), params, phi)
    for a, b in zip(*map(jax.tree.leaves, (found[1], exact[1])), strict=True):
        assert jnp.abs(a - b).max() > 0.01 * jnp.abs(b).max()


def test_reptile_learns_phi_alone():
    params, phi, loss, begin = shifted()

    @quick.jit
    def by_hand(phi, task, keys):
        own = ended(loss, begin, params, phi, task[0], keys)
        judged = loss(params, own, task[1], keys[-1])
        return judged, {path: jax.tree.map(jnp.subtract, phi[path], own[path]) for path in phi}

    wanted = over_tasks(lambda *task: by_hand(phi, *task))
    learner = pj.meta.reptile(loss, optax.sgd(RATE), steps=STEPS, begin=begin)
    small.assert_close(both(learner, params, phi), wanted, 1e-12)


@pytest.mark.parametrize('make', [pj.meta.maml, pj.meta.reptile])
def test_one_task_adapts_with_what_it_begins_with(make):
    params, phi, loss, begin = shifted()
    support, _ = small.task(small.tasks(), 0)
    learner = make(loss, optax.sgd(RATE), steps=STEPS, begin=begin)
    own = learner.adapt(params, phi, support, jax.random.fold_in(KEY, 0))
    by_hand = quick.jit(lambda phi, *task: ended(loss, begin, params, phi, *task))
    wanted = by_hand(phi, support, small.keys_of(KEY, 0, STEPS))
    small.assert_close(dict(own), dict(wanted), 1e-12)


def test_a_part_that_phi_has_is_refused():
    params, phi, loss, begin = shifted()
    taken = lambda *args: {'up/kernel': begin(*args)['shift']}
    learner = pj.meta.maml(loss, optax.sgd(RATE), steps=1, begin=taken)
    with pytest.raises(ValueError, match=r"must stand beside phi: both have \['up/kernel'\]"):
        learner.loss(params, phi, small.tasks(), KEY)
