"""MAML, FOMAML and ANIL against what they are defined as, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
import small
from cases import first_everywhere
from jax import lax

import peftjax as pj

KEY, STEPS = jax.random.key(7), 3
OPTIMIZERS = {
    'sgd': lambda: optax.sgd(0.3),
    'adam': lambda: optax.adam(0.05, eps_root=1e-8),
    'clipped, with decay': lambda: optax.chain(
        optax.clip_by_global_norm(0.3), optax.add_decayed_weights(0.1), optax.sgd(0.3)
    ),
}


@pytest.fixture(autouse=True)
def climate():
    with small.doubles(), jax.numpy_dtype_promotion('standard'):  # of optax
        yield


def both(loss):
    """A loss and its gradient."""
    return quick.jit(jax.value_and_grad(loss, argnums=1))


def unrolled(loss, tx, params, phi, tasks, key, adapts=lambda path: True):
    """The loss of MAML, without vmap, scan or checkpoint."""
    found = 0.0
    for i in range(small.TASKS):
        support, query = small.task(tasks, i)
        keys = small.keys_of(key, i, STEPS)
        own = small.by_hand(loss, tx, STEPS, params, phi, support, keys, adapts)
        found += loss(params, own, query, keys[-1]) / small.TASKS
    return found


@pytest.mark.parametrize('optimizer', first_everywhere(OPTIMIZERS))
def test_the_gradient_is_that_of_the_unrolled_loop(optimizer):
    params, phi, loss = small.make()
    tasks, tx = small.tasks(), OPTIMIZERS[optimizer]()
    learner = pj.meta.maml(loss, tx, steps=STEPS)
    found = both(learner.loss)(params, phi, tasks, KEY)
    by_hand = lambda *args: unrolled(loss, tx, *args)
    wanted = both(by_hand)(params, phi, tasks, KEY)
    small.assert_close(found, wanted, 1e-12)


@pytest.mark.parametrize('method', first_everywhere(small.METHODS))
def test_the_gradient_is_that_of_finite_differences(method):
    params, phi, loss = small.make(method)
    tasks = small.tasks()
    raw = pj.meta.maml(loss, optax.sgd(0.3, momentum=0.5), steps=STEPS).loss
    of, (_, gradient) = quick.jit(raw), both(raw)(params, phi, tasks, KEY)
    leaves, tree = jax.tree.flatten(phi)
    for i, (leaf, slope) in enumerate(zip(leaves, jax.tree.leaves(gradient), strict=True)):
        along = small.drawn(30 + i, *leaf.shape)
        along /= jnp.linalg.norm(along.ravel())
        moved = lambda by, i=i, along=along: jax.tree.unflatten(
            tree, [x + by * along if j == i else x for j, x in enumerate(leaves)]
        )
        ahead, behind = (of(params, moved(by), tasks, KEY) for by in (1e-5, -1e-5))
        difference = (ahead - behind) / 2e-5
        np.testing.assert_allclose((slope * along).sum(), difference, rtol=1e-6, atol=1e-10)


def test_second_order_is_not_first_order():
    params, phi, loss = small.make()
    tasks = small.tasks()
    of = lambda first: pj.meta.maml(loss, optax.sgd(0.3), steps=STEPS, first_order=first).loss
    gradients = [both(of(first))(params, phi, tasks, KEY)[1] for first in (False, True)]
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert np.abs(a - b).max() > 0.01 * np.abs(b).max()


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', ['sgd', 'adam'])
def test_first_order_is_the_gradient_where_the_loop_ended(optimizer):
    params, phi, loss = small.make('chain')
    tasks, tx = small.tasks(), OPTIMIZERS[optimizer]()
    learner = pj.meta.maml(loss, tx, steps=STEPS, first_order=True)
    found = both(learner.loss)(params, phi, tasks, KEY)

    @quick.jit
    def by_hand(params, phi, task, keys):
        support, query = task
        own = small.by_hand(loss, tx, STEPS, params, phi, support, keys)
        return jax.value_and_grad(loss, argnums=1)(params, own, query, keys[-1])

    each = [
        by_hand(params, phi, small.task(tasks, i), small.keys_of(KEY, i, STEPS))
        for i in range(small.TASKS)
    ]
    wanted = jax.tree.map(lambda *x: sum(x) / small.TASKS, *each)
    small.assert_close(found, wanted, 1e-12)
    alone = quick.jit(learner.loss)(params, phi, tasks, KEY)  # where no gradient is asked for
    small.assert_close(alone, wanted[0], 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize('target', ['head', ['head/bias', 'up/kernel/b']])
@pytest.mark.parametrize('first_order', [False, True])
def test_only_what_a_target_finds_adapts(target, first_order):
    """ANIL: the rest has a gradient, through the inner steps too, and stays as it is within."""
    params, phi, loss = small.make('chain')
    tasks, tx = small.tasks(), optax.sgd(0.3)
    learner = pj.meta.maml(loss, tx, steps=STEPS, target=target, first_order=first_order)
    names = (target,) if isinstance(target, str) else target
    spelled = lambda path: path.replace("']['", '/')
    adapts = lambda path: any(name in spelled(path) for name in names)
    support, _ = small.task(tasks, 0)
    own = learner.adapt(params, phi, support, jax.random.fold_in(KEY, 0))
    keys = small.keys_of(KEY, 0, STEPS)
    by_hand = quick.jit(lambda *args: small.by_hand(loss, tx, STEPS, *args, adapts))
    wanted = by_hand(params, phi, support, keys)
    small.assert_close(own, wanted, 1e-12)
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(phi), small.bits(phi), small.bits(own), strict=True
    )
    still = {spelled(jax.tree_util.keystr(path)): a == b for (path, _), a, b in pairs}
    assert still == {path: not adapts(path) for path in still}
    assert set(still.values()) == {True, False}
    _, found = both(learner.loss)(params, phi, tasks, KEY)
    assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(found))
    if not first_order:
        _, wanted = both(lambda *args: unrolled(loss, tx, *args, adapts))(params, phi, tasks, KEY)
        small.assert_close(found, wanted, 1e-12)


@pytest.mark.slow
def test_a_loss_with_a_count_is_minimized_by_its_mean():
    params, phi, loss = small.make()
    tasks = small.tasks()
    counted = lambda *args: pj.losses.Loss(5.0 * loss(*args), jnp.array(5.0))
    for first_order in (False, True):
        gradients = [
            both(pj.meta.maml(of, optax.sgd(0.3), steps=2, first_order=first_order).loss)(
                params, phi, tasks, KEY
            )
            for of in (loss, counted)
        ]
        small.assert_close(*gradients, 1e-12)


@pytest.mark.slow
def test_adam_needs_a_derivative_at_zero():
    """The gradient of LoRA's `a` is zero while `b` is: a square root has no derivative there."""
    params, phi, loss = small.make()
    phi = {path: {**own, 'b': jnp.zeros_like(own['b'])} for path, own in phi.items()}
    for eps_root, good in ((0.0, False), (1e-8, True)):
        learner = pj.meta.maml(loss, optax.adam(0.01, eps_root=eps_root), steps=2)
        _, found = both(learner.loss)(params, phi, small.tasks(), KEY)
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(found)) == good


@pytest.mark.parametrize(
    ('how', 'error', 'said'),
    [
        ({'steps': 0}, ValueError, 'steps must be at least 1: received 0'),
        ({'steps': 1, 'target': {'head': 1}}, TypeError, 'target must be a regular expression'),
        ({'steps': 1, 'target': '('}, ValueError, 'is not a regular expression'),
    ],
)
def test_what_makes_no_inner_loop_is_refused(how, error, said):
    _, _, loss = small.make()
    for make in (pj.meta.maml, pj.meta.adapter):
        with pytest.raises(error, match=said):
            make(loss, optax.sgd(0.1), **how)


@pytest.mark.parametrize('first_order', [False, True])
def test_an_inner_optimizer_is_told_the_loss(first_order):
    """Polyak's rate is the loss over the square of its gradient."""
    params, phi, loss = small.make()
    tasks, tx = small.tasks(), optax.polyak_sgd(max_learning_rate=0.3)
    learner = pj.meta.maml(loss, tx, steps=2, first_order=first_order)

    def unrolled(phi, task, key):
        support, query = task
        state, own = tx.init(phi), phi
        for i in range(2):
            of = lambda own, i=i: loss(params, own, support, jax.random.fold_in(key, i))
            found, grads = jax.value_and_grad(of)(own)
            updates, state = tx.update(grads, state, own, value=found)
            own = optax.apply_updates(own, updates)
        if first_order:
            own = jax.tree.map(lambda own, phi: phi + lax.stop_gradient(own - phi), own, phi)
        return loss(params, own, query, jax.random.fold_in(key, 2))

    def mean(phi):
        each = lambda i: unrolled(phi, small.task(tasks, i), jax.random.fold_in(KEY, i))
        return sum(map(each, range(small.TASKS))) / small.TASKS

    found = jax.grad(learner.loss, argnums=1)(params, phi, tasks, KEY)
    small.assert_close(dict(found), dict(jax.jit(jax.grad(mean))(phi)), 1e-10)


@pytest.mark.parametrize(
    ('make', 'said'),
    [
        (lambda loss: loss[None], r'received .*Tracer of shape \(1,\). Take a mean'),
        (lambda loss: (loss, 1), 'received tuple. Take a mean, and leave out'),
        (lambda loss: None, 'received NoneType'),
    ],
)
def test_a_loss_that_is_no_scalar_is_refused(make, said):
    """A mean over what a query alone has one for each row of would be silent."""
    params, phi, loss = small.make()
    sgd, rows = optax.sgd(0.1), len(small.tasks()[1][1][0])
    own = lambda params, phi, batch, key: (
        make(loss(params, phi, batch, key)) if len(batch[1]) == rows
        else loss(params, phi, batch, key)
    )  # fmt: skip
    learners = [
        pj.meta.maml(own, sgd, steps=1),
        pj.meta.maml(own, sgd, steps=1, first_order=True),
        pj.meta.reptile(own, sgd, steps=2),
        pj.meta.imaml(own, sgd, steps=1, strength=1.0),
        pj.meta.meta_sgd(own, rate=0.1),
    ]
    for learner in learners:
        with pytest.raises(TypeError, match=said):
            learner.loss(params, learner.init(phi), small.tasks(), KEY)


def test_what_are_no_tasks_is_refused():
    params, phi, loss = small.make()
    learner, tasks = pj.meta.maml(loss, optax.sgd(0.1), steps=1), small.tasks()
    support, query = tasks
    run = lambda tasks: learner.loss(params, phi, tasks, KEY)
    with pytest.raises(TypeError, match=r'must be a pair \(support, query\): received 3 of them'):
        run((support, query, query))
    with pytest.raises(TypeError, match='must be a pair .*: received dict'):
        run({'support': support, 'query': query})
    with pytest.raises(ValueError, match=r'as many for all .*\(2, 9, 4\) at tasks\[1\]\[0\]'):
        run((support, jax.tree.map(lambda x: x[:2], query)))
    with pytest.raises(ValueError, match=r'at least one .* received \(0, 6, 4\) at tasks\[0\]'):
        run(jax.tree.map(lambda x: x[:0], tasks))
    with pytest.raises(ValueError, match=r"no leaf matches target='hed'. Nearest: 'head/kernel/a'"):
        nothing = pj.meta.maml(loss, optax.sgd(0.1), steps=1, target='hed')
        nothing.loss(params, phi, tasks, KEY)
