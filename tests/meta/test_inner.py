"""The inner loop: nothing leaks between tasks, only states are kept, nothing compiles twice."""

import jax
import jax.numpy as jnp
import optax
import pytest
import small
from compiled import compiled

import peftjax as pj

KEY, MANY = jax.random.key(3), 10
TX = optax.sgd(0.2, momentum=0.9)


@pytest.fixture(scope='module')
def setting():
    params, phi, loss = small.make()
    return params, phi, loss, small.tasks(MANY), pj.meta.maml(loss, TX, steps=3)


@pytest.fixture(scope='module')
def adapt_all(setting):
    params, phi, _, _, learner = setting
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(MANY))
    run = jax.jit(jax.vmap(learner.adapt, (None, None, 0, 0)))
    return lambda support: run(params, phi, support, keys)


def test_a_task_does_not_know_of_the_others(setting, adapt_all):
    """Bit for bit: each of ten tasks among nine others than it was among."""
    _, _, _, (support, _), _ = setting
    together = adapt_all(support)
    others, _ = small.tasks(MANY, seed=50)
    for i in range(MANY):
        among = jax.tree.map(lambda new, old, i=i: new.at[i].set(old[i]), others, support)
        found = adapt_all(among)
        assert small.bits(small.task(found, i)) == small.bits(small.task(together, i))
        other = (i + 1) % MANY
        assert small.bits(small.task(found, other)) != small.bits(small.task(together, other))


def test_each_alone_is_as_all_together(setting, adapt_all):
    params, phi, _, (support, _), learner = setting
    together = adapt_all(support)
    for i in range(MANY):
        alone = learner.adapt(params, phi, small.task(support, i), jax.random.fold_in(KEY, i))
        small.assert_close(dict(alone), dict(small.task(together, i)), 1e-5)


def test_gradients_of_tasks_do_not_leak_either(setting):
    """In an outer step too: a task that diverges changes no bit of another one's gradient."""
    params, phi, _, tasks, learner = setting

    def weighted(phi, weights, tasks):
        one = lambda i, task: learner.loss(
            params, phi, jax.tree.map(lambda x: x[None], task), jax.random.fold_in(KEY, i)
        )
        return (weights * jax.vmap(one)(jnp.arange(MANY), tasks)).sum()

    run = jax.jit(jax.grad(weighted))
    only = jnp.zeros(MANY).at[4].set(1.0)
    wanted = run(phi, only, tasks)
    wild = jax.tree.map(
        lambda x: x if x.dtype == jnp.int32 else x.at[jnp.arange(MANY) != 4].mul(1e3), tasks
    )
    assert small.bits(run(phi, only, wild)) == small.bits(wanted)


def test_adapting_is_compiled_once(setting):
    params, phi, loss, (support, _), _ = setting
    traces = []

    def counted(params, phi, batch, key):
        traces.append(1)
        return loss(params, phi, batch, key)

    adapt = pj.meta.adapter(counted, TX, steps=4)
    first = adapt(params, phi, small.task(support, 0), KEY)
    before = len(traces)
    with compiled() as names:
        others = [
            adapt(params, phi, small.task(support, i), jax.random.fold_in(KEY, i)) for i in (1, 2)
        ]
    assert len(traces) == before and not [name for name in names if 'adapt' in name]
    assert small.bits(first) != small.bits(others[0]) != small.bits(others[1])


def test_steps_draw_from_keys_of_their_own_and_states_begin_anew(setting):
    params, phi, _, (support, _), learner = setting
    one = small.task(support, 0)
    run = lambda key: small.bits(learner.adapt(params, phi, one, key))
    first, other, again = run(KEY), run(jax.random.key(4)), run(KEY)
    assert first == again != other
    drawn = []
    noted = lambda params, phi, batch, key: (
        jax.debug.callback(lambda bits: drawn.append(bits.tobytes()), jax.random.key_data(key)),
        sum(x.sum() for x in jax.tree.leaves(phi)),
    )[1]
    pj.meta.adapter(noted, TX, steps=5)(params, phi, one, KEY)
    jax.effects_barrier()
    assert len(drawn) == len(set(drawn)) == 5


def temporaries(steps, *, wide=64, rows=100, **how):
    """Of a meta gradient over two tasks; and the bytes of phi and theta."""
    kernels = {f'layer_{i}': {'kernel': small.drawn(i, wide, wide) / 8} for i in range(8)}

    def apply(params, x):
        for layer in params.values():
            x = jnp.tanh(x @ layer['kernel'])
        return x

    x = jnp.zeros((2, rows, wide))
    peft = pj.attach(pj.Lora(rank=1, target='kernel'), apply, kernels, x[0])
    phi, forward = peft.init(KEY, kernels), peft.wrap(apply)
    loss = lambda params, phi, x, key: jnp.square(forward(params, phi, x)).mean()
    learner = pj.meta.maml(loss, optax.sgd(0.1, momentum=0.9), steps=steps, **how)
    step = jax.jit(jax.grad(learner.loss, argnums=1))
    analysis = step.lower(kernels, phi, (x, x), KEY).compile().memory_analysis()
    nbytes = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    return analysis.temp_size_in_bytes, nbytes(phi), nbytes(kernels)


def test_memory_grows_with_states_alone():
    """By phi of each task for each step, where a step's activations are fifty times as large.

    Momentum is a state too, but one through which the derivative is known without it.
    """
    (few, phi, _), (many, _, _) = temporaries(8), temporaries(40)
    assert 0.9 * 2 * phi <= (many - few) / 32 <= 1.1 * 2 * phi


@pytest.mark.slow
def test_of_a_part_only_its_states_are_kept():
    (few, phi, _), (many, _, _) = (temporaries(steps, target='layer_7') for steps in (8, 40))
    assert 0.9 * 2 * phi / 8 <= (many - few) / 32 <= 1.1 * 2 * phi / 8


@pytest.mark.slow
def test_at_first_order_nothing_is_kept():
    (few, *_), (many, *_) = (temporaries(steps, first_order=True) for steps in (8, 40))
    assert few == many < temporaries(8)[0]


def test_theta_is_neither_copied_nor_differentiated():
    found, _, theta = temporaries(4, wide=256, rows=4)
    assert found < theta / 2
