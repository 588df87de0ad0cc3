"""iMAML against what can be solved on paper, and against MAML where the inner loop converges."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
import small

import peftjax as pj

KEY, SIZE, TASKS, STRENGTH = jax.random.key(7), 6, 4, 1.5


@pytest.fixture(autouse=True)
def climate():
    with small.doubles(), jax.numpy_dtype_promotion('standard'):  # of optax
        yield


def quadratic(params, phi, batch, key):
    """`|root^T (W x - b)|^2 / 2` of two leaves, of which `params` says something too."""
    del key
    root, b = batch
    x = params['scale'] * jnp.concatenate([phi['first']['a'], phi['second']['a'].ravel()])
    return jnp.square(root.T @ (x - b)).sum() / 2


def setting():
    params = {'scale': jnp.array(0.7)}
    phi = {'first': {'a': small.drawn(0, 2)}, 'second': {'a': small.drawn(1, 2, 2)}}
    halves = [
        (small.drawn(i, TASKS, SIZE, SIZE) / 2, small.drawn(i + 1, TASKS, SIZE)) for i in (2, 4)
    ]
    return params, phi, tuple(halves)


def on_paper(params, phi, tasks):
    """The loss and its gradient: each task's minimum, and the derivative of that."""
    s = float(params['scale'])
    x0 = np.concatenate([np.ravel(x) for x in jax.tree.leaves(phi)])
    losses, gradients = [], []
    for i in range(TASKS):
        (root, b), (query_root, c) = jax.tree.map(lambda x, i=i: np.asarray(x[i]), tasks)
        hessian = s * s * root @ root.T
        solved = np.linalg.solve(
            hessian + STRENGTH * np.eye(SIZE), s * root @ root.T @ b + STRENGTH * x0
        )
        away = query_root.T @ (s * solved - c)
        losses.append(away @ away / 2)
        slope = s * query_root @ away
        gradients.append(np.linalg.solve(np.eye(SIZE) + hessian / STRENGTH, slope))
    return np.mean(losses), np.mean(gradients, 0)


def test_it_is_the_analytic_solution_on_a_quadratic():
    params, phi, tasks = setting()
    value, wanted = on_paper(params, phi, tasks)
    learner = pj.meta.imaml(
        quadratic, optax.sgd(0.3), steps=400, strength=STRENGTH, solver_steps=SIZE
    )
    found, gradient = quick.jit(jax.value_and_grad(learner.loss, argnums=1))(
        params, phi, tasks, KEY
    )
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])
    np.testing.assert_allclose(found, value, rtol=1e-10)
    np.testing.assert_allclose(flat, wanted, rtol=1e-9)


def test_more_products_are_more_exact_and_too_many_do_no_harm():
    params, phi, tasks = setting()
    _, wanted = on_paper(params, phi, tasks)

    def away(solver_steps):
        learner = pj.meta.imaml(
            quadratic, optax.sgd(0.3), steps=400, strength=STRENGTH, solver_steps=solver_steps
        )
        gradient = quick.jit(jax.grad(learner.loss, argnums=1))(params, phi, tasks, KEY)
        flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])
        return np.abs(flat - wanted).max()

    assert away(1) > 3 * away(3) > 3e4 * away(SIZE) and away(10 * SIZE) < 1e-8


def test_through_a_wrapped_model_it_is_mamls_gradient_where_the_loop_converges():
    params, phi, noisy = small.make()
    loss = lambda params, phi, batch, key: noisy(params, phi, batch, KEY)
    tasks, strength = small.tasks(), 2.0
    tx = optax.sgd(0.3)
    learner = pj.meta.imaml(loss, tx, steps=150, strength=strength, solver_steps=30)

    def solved(params, phi, tasks, key):
        """Every task's minimum, differentiated through all steps that lead there."""

        def one(support, query):
            def held(params, mine, batch, key):
                squares = jax.tree.map(lambda a, b: jnp.square(a - b).sum(), mine, phi)
                return loss(params, mine, batch, key) + strength / 2 * sum(jax.tree.leaves(squares))

            return loss(
                params, pj.meta.adapter(held, tx, steps=150)(params, phi, support, key), query, key
            )

        return jax.vmap(one)(*tasks).mean()

    run = lambda fn: quick.jit(jax.value_and_grad(fn, argnums=1))(params, phi, tasks, KEY)
    small.assert_close(run(learner.loss), run(solved), 1e-8)


@pytest.mark.slow
def test_memory_does_not_depend_on_the_inner_steps():
    params, phi, loss = small.make()

    def temporaries(steps):
        learner = pj.meta.imaml(loss, optax.sgd(0.3), steps=steps, strength=2.0)
        lowered = jax.jit(jax.grad(learner.loss, argnums=1)).lower(params, phi, small.tasks(), KEY)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(64) <= temporaries(4) + 1024


@pytest.mark.parametrize(
    ('how', 'error', 'said'),
    [
        ({'strength': 0.0}, ValueError, 'strength must be a positive number: received 0'),
        ({'strength': jnp.inf}, ValueError, 'strength must be a positive number: received inf'),
        ({'strength': 1.0, 'solver_steps': 0}, ValueError, 'solver_steps must be at least 1'),
        ({'strength': 1.0, 'solver_steps': 2.5}, TypeError, 'solver_steps must be an integer'),
    ],
)
def test_what_has_no_solution_is_refused(how, error, said):
    with pytest.raises(error, match=said):
        pj.meta.imaml(quadratic, optax.sgd(0.1), steps=1, **how)
