"""Many phi on one theta: stacks, and K trainings in one program, each equal to training alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import compiled
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from zoo import normal

import peftjax as pj

WIDTH, ROWS, STEPS = 6, 8, 12
PARAMS = {
    'up': {'kernel': normal(0, WIDTH, 9, fan=WIDTH), 'bias': 0.1 * normal(1, 9)},
    'down': {'kernel': normal(2, 9, 4, fan=9)},
}
X, Y = normal(3, STEPS, ROWS, WIDTH), normal(4, STEPS, ROWS, 4)


def model(params, x):
    h = jnp.tanh(x @ params['up']['kernel'] + params['up']['bias'][None])
    return h @ params['down']['kernel']


def attached(method=None, **fields):
    fields = {'rank': 2, 'target': 'kernel', **fields}
    return pj.attach(method or pj.Lora(**fields), model, PARAMS, X[0])


PEFT = attached(alpha=3.0)
FORWARD = PEFT.wrap(model)
TX = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(3e-2, weight_decay=0.1))


def loss_fn(params, phi, batch, key):
    x, y = batch
    noisy = x + 0.01 * jax.random.normal(key, x.shape)  # each member draws from its own key
    return jnp.mean((FORWARD(params, phi, noisy) - y) ** 2)


STEP = pj.train_step(loss_fn, TX)


def fresh(seed, peft=PEFT):
    return peft.init(jax.random.key(seed), PARAMS)


def trained(step, params, state, batches):
    """A state and the losses of all steps."""
    losses = []
    with jax.numpy_dtype_promotion('standard'):  # of optax's counts
        for batch in batches:
            state, loss = step(params, state, batch)
            losses.append(loss)
    return state, jnp.stack(losses)


def many(step=STEP, in_axes=(None, 0, None)):
    return jax.jit(jax.vmap(step, in_axes=in_axes), donate_argnums=1)


def close(one, other, tolerance=1e-6):
    each = lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    jax.tree.map(each, one, other)


KEYS = jax.random.split(jax.random.key(7), 3)
BATCHES = list(zip(X, Y, strict=True))


def test_seeds_are_trained_at_once():
    states = [pj.start(TX, fresh(seed), jax.random.key(seed)) for seed in range(3)]
    together, losses = trained(many(), PARAMS, pj.stack(states), BATCHES)
    assert together.step.tolist() == [STEPS] * 3 and together.skipped.tolist() == [0] * 3
    for i, own in enumerate(pj.unstack(together)):
        alone, path = trained(STEP, PARAMS, pj.start(TX, fresh(i), jax.random.key(i)), BATCHES)
        close(own.phi, alone.phi)
        close(own.opt_state, alone.opt_state)
        close(losses[:, i], path)
    assert (losses[-1] < losses[0]).all() and len(set(losses[-1].tolist())) == 3


def test_tasks_are_trained_at_once():
    targets = Y + jnp.arange(3.0)[:, None, None, None]
    states = pj.stack([pj.start(TX, fresh(0), jax.random.key(0)) for _ in targets])
    batches = [(x, targets[:, i]) for i, x in enumerate(X)]
    step = many(in_axes=(None, 0, (None, 0)))
    together, losses = trained(step, PARAMS, states, batches)
    for i, own in enumerate(pj.unstack(together)):
        state = pj.start(TX, fresh(0), jax.random.key(0))
        alone, path = trained(STEP, PARAMS, state, zip(X, targets[i], strict=True))
        close(own.phi, alone.phi)
        close(losses[:, i], path)


def tuned(rate):
    """AdamW whose rate lies in its state."""
    return optax.inject_hyperparams(optax.adamw)(learning_rate=rate, weight_decay=0.1)


def test_learning_rates_are_trained_at_once():
    """And one that diverges stops itself alone: its steps are skipped, those of others are not."""
    phi = jax.tree.map(lambda a: a + 0.1, fresh(0))  # Adam divides by gradients: none near zero
    rates = jnp.array([1e-3, 3e-2, 1e38])
    start = lambda rate: pj.start(tuned(rate), jax.tree.map(jnp.copy, phi), jax.random.key(0))
    states = jax.vmap(start)(jnp.copy(rates))  # they lie in the state, which is donated
    step = pj.train_step(loss_fn, tuned(0.0))
    together, losses = trained(many(step), PARAMS, states, BATCHES)
    assert together.skipped[2] > 0 and together.skipped[:2].tolist() == [0, 0]
    for i, rate in enumerate(rates[:2]):
        tx = tuned(float(rate))
        state = pj.start(tx, jax.tree.map(jnp.copy, phi), jax.random.key(0))
        alone, path = trained(pj.train_step(loss_fn, tx), PARAMS, state, BATCHES)
        close(pj.unstack(together)[i].phi, alone.phi)
        close(losses[:, i], path)


RANKED = [
    attached(rank=1, alpha=4.0),
    attached(rank=4, alpha=2.0, ranks=(('up', 3),), dropout=0.0),
    attached(rank=2, alpha=2.0, rank_stabilized=True, alphas=(('down', 6.0),)),
]
CHAINS = [
    attached(
        pj.chain(pj.Dora(rank=rank, alpha=3.0, target='down'), head=pj.BitFit(target='up/bias'))
    )
    for rank in (1, 3)
]


@pytest.mark.parametrize('pefts', [RANKED, CHAINS], ids=['lora', 'chain'])
def test_ranks_are_trained_at_once(pefts):
    padded = pj.pad_ranks(pefts)
    forward = padded.peft.wrap(model)

    def loss_at(frozen, phi, batch, key):
        del key
        params, scale = frozen
        return jnp.mean((forward(params, padded.scaled(phi, scale), batch[0]) - batch[1]) ** 2)

    phis = padded.pad([fresh(i, peft) for i, peft in enumerate(pefts)])
    keys = jax.random.split(jax.random.key(0), len(pefts))
    states = jax.vmap(lambda phi, key: pj.start(TX, phi, key))(phis, keys)
    step = many(pj.train_step(loss_at, TX), ((None, 0), 0, None))
    together, losses = trained(step, (PARAMS, padded.scales), states, BATCHES)
    for i, (peft, own) in enumerate(zip(pefts, padded.cut(together.phi), strict=True)):
        wrapped = peft.wrap(model)
        alone = lambda params, phi, batch, key, wrapped=wrapped: jnp.mean(
            (wrapped(params, phi, batch[0]) - batch[1]) ** 2
        )
        state = pj.start(TX, fresh(i, peft), jax.random.key(0))
        state, path = trained(pj.train_step(alone, TX), PARAMS, state, BATCHES)
        close(own, state.phi)
        close(losses[:, i], path)
    again = padded.pad(padded.cut(together.phi))
    same = lambda a, b: bool((a == b).all())
    assert jax.tree.all(jax.tree.map(same, again, together.phi)), 'what is padded stays zero'


def test_scales_are_as_wide_as_phi():
    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (PARAMS, X[0]))
        of = lambda rank: pj.Lora(rank=rank, alpha=1, target='up/k', dtype='float64')
        padded = pj.pad_ranks([pj.attach(of(rank), model, params, x) for rank in (3, 1)])
        scales = padded.scales['up/kernel']
        assert scales.dtype == jnp.float64 and scales.tolist() == [1 / 3, 1]


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_a_narrow_phi_is_not_rounded_by_its_scale(dtype):
    """Of scales that no narrow dtype holds: what it computes is that of the member alone."""
    pefts = [attached(rank=rank, alpha=1.0, dtype=dtype) for rank in (3, 1)]
    padded, phis = pj.pad_ranks(pefts), [fresh(i, peft) for i, peft in enumerate(pefts)]
    phis = [jax.tree.map(lambda x: x + jnp.asarray(0.3, x.dtype), phi) for phi in phis]
    forward = padded.peft.wrap(model)
    one = lambda phi, scale: forward(PARAMS, padded.scaled(phi, scale), X[0])
    together = jax.vmap(one)(padded.pad(phis), padded.scales)
    for peft, phi, found in zip(pefts, phis, together, strict=True):
        np.testing.assert_allclose(found, peft.wrap(model)(PARAMS, phi, X[0]), rtol=2e-6, atol=2e-6)


def test_theta_is_held_once():
    """Every K gets the same theta, and the compiled program takes it once."""

    def arguments(count):
        states = pj.stack([pj.start(TX, fresh(0), jax.random.key(0))] * count)
        with jax.numpy_dtype_promotion('standard'):  # of optax's counts
            lowered = many().lower(PARAMS, states, BATCHES[0])
        return lowered.compile().memory_analysis().argument_size_in_bytes

    state = pj.start(TX, fresh(0), jax.random.key(0))._replace(key=jnp.zeros(2, jnp.uint32))
    held = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    for count in (2, 8):
        want = held(PARAMS) + held(BATCHES[0]) + count * held(state)
        assert abs(arguments(count) - want) < 64


def test_a_stack_lies_along_theta():
    """On a mesh, with the numbers of one device; rows of a mixed batch are split as any batch."""
    mesh = jax.make_mesh((2, 2), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)
    rules = (('up/kernel', P('model', None)), ('down/kernel', P(None, 'model')))
    there = jax.device_put(PARAMS, pj.sharding.by_path(rules, mesh, PARAMS))
    rows = pj.sharding.batch_sharding(mesh)
    index = jnp.arange(ROWS) % 3

    def run(params, put):
        states = [pj.start(TX, PEFT.init(key, params), key) for key in KEYS]
        batches = [(put(x), put(y)) for x, y in BATCHES[:3]]
        together, losses = trained(many(), params, pj.stack(states), batches)
        forward = jax.jit(pj.mixed(PEFT, model))
        return together.phi, losses, forward(params, pj.Rows(together.phi, put(index)), put(X[0]))

    alone = run(PARAMS, lambda x: x)
    with jax.set_mesh(mesh):
        found = run(there, lambda x: jax.device_put(x, rows))
    close(jax.device_get(found), jax.device_get(alone))
    assert found[0]['up/kernel']['a'].sharding.spec == P(None, 'model')
    assert found[0]['down/kernel']['b'].sharding.spec == P(None, None, 'model')
    assert found[2].sharding.spec[0] == 'data'


# Stacks -------------------------------------------------------------------------------------------


def test_stack_and_unstack():
    phis = [fresh(seed) for seed in range(3)]
    stacked = pj.stack(phis)
    assert jax.tree.map(jnp.shape, stacked) == {
        'down/kernel': {'a': (3, 9, 2), 'b': (3, 2, 4)},
        'up/kernel': {'a': (3, 6, 2), 'b': (3, 2, 9)},
    }
    for one, other in zip(pj.unstack(stacked), phis, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    states = [pj.start(TX, phi, jax.random.key(i)) for i, phi in enumerate(phis)]
    again = pj.unstack(pj.stack(states))
    assert jax.random.key_data(again[2].key).tolist() == jax.random.key_data(states[2].key).tolist()


def test_room_is_empty_until_it_is_filled():
    phis = [fresh(seed) for seed in range(3)]
    stacked = pj.stack(phis[:1], room=3)
    out = jax.vmap(FORWARD, in_axes=(None, 0, None))(PARAMS, stacked, X[0])
    assert jnp.isfinite(out[0]).all() and jnp.isnan(out[1:]).all()
    with compiled() as names:
        for place in (1, 2):
            stacked = pj.swap(stacked, place, phis[place])
        first = len(names)
        stacked = pj.swap(stacked, 1, phis[0])
        assert len(names) == first <= 1
    jax.tree.map(np.testing.assert_array_equal, stacked, pj.stack([phis[0], phis[0], phis[2]]))


def test_a_place_that_only_a_program_knows():
    """Where there is none, nothing is lost."""
    stacked, new = pj.stack([{'a': jnp.full(2, i)} for i in (0.0, 1.0)]), {'a': jnp.full(2, 5.0)}
    swap = jax.jit(pj.swap)
    found = {place: swap(stacked, place, new)['a'][:, 0].tolist() for place in (-1, 1, 2)}
    assert found == {-1: [0.0, 1.0], 1: [0.0, 5.0], 2: [0.0, 1.0]}
    for place in (0.6, True, jnp.array([0, 1])):
        wrong('a place must be an integer', lambda p=place: swap(stacked, p, new), TypeError)


def wrong(message, call, kind=ValueError):
    with pytest.raises(kind, match=message):
        call()


def test_what_cannot_be_stacked():
    phi, thick = fresh(0), fresh(0, attached(rank=3))
    wrong(r'needs a tree at least', lambda: pj.stack([]))
    wrong(
        r"tree 1 of a stack .* 'down/kernel/a' is float32\[9,3\], not float32\[9,2\].*pad_ranks",
        lambda: pj.stack([phi, thick]),
    )
    other = fresh(0, attached(pj.Ia3(target='kernel')))
    wrong(
        "'down/kernel/a' is missing.*; 'down/kernel/l' is unknown", lambda: pj.stack([phi, other])
    )
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), phi)
    wrong(r'is bfloat16\[9,2\], not float32\[9,2\]', lambda: pj.stack([phi, half]))
    wrong('a list of trees; got one dict', lambda: pj.stack(phi), TypeError)
    wrong('room must be an integer', lambda: pj.stack([phi], room=4.0), TypeError)
    wrong(
        'the containers of the first',
        lambda: pj.stack([[jnp.zeros(2)], (jnp.zeros(2),)]),
    )
    wrong('3 trees need room for as many; got room=2', lambda: pj.stack([phi] * 3, room=2))
    state = pj.start(TX, phi, jax.random.key(0))
    wrong('a list of trees; got one TrainState', lambda: pj.stack(state), TypeError)
    wrong('room is for arrays of floats', lambda: pj.stack([state], room=2))


def test_what_is_no_stack():
    phis = pj.stack([fresh(0)] * 2)
    odd = {**phis, 'up/kernel': pj.stack([fresh(0)] * 3)['up/kernel']}
    wrong(r'first axis in common; got 2 at .down/kernel/a., 3 at', lambda: pj.unstack(odd))
    wrong('got None at', lambda: pj.unstack({'a': jnp.zeros(())}))
    wrong('got no arrays', lambda: pj.unstack({}))
    wrong('has places 0 to 1; got 2', lambda: pj.swap(phis, 2, fresh(0)))
    for place in (-1, np.int64(-1), np.int64(2), jnp.int32(9)):
        wrong(
            f'has places 0 to 1; got {place}|at least 0', lambda p=place: pj.swap(phis, p, fresh(0))
        )
    for place in (1.0, np.float32(0.5), True):
        wrong('a place must be an int', lambda p=place: pj.swap(phis, p, fresh(0)), TypeError)
    thick = fresh(0, attached(rank=3))
    wrong('a member of this stack .*pj.pad_ranks', lambda: pj.swap(phis, 0, thick))
    wrong('phi must be of the model', lambda: FORWARD(PARAMS, phis, X[0]))


def test_what_cannot_be_padded():
    of = functools.partial(attached)
    wrong('a plan at least', lambda: pj.pad_ranks([]))
    pad = lambda other: pj.pad_ranks([PEFT, other])
    wrong("plan 1 has not the same sites: 'down/kernel'", lambda: pad(of(target='up/kernel')))
    wrong('plan 1 is Lora.*dropout=0.5', lambda: pad(of(dropout=0.5)))
    wrong('plan 1 is Dora', lambda: pad(of(pj.Dora(rank=2, target='kernel'))))
    wrong('plan 1 is Chain', lambda: pad(of(pj.chain(pj.Lora(rank=2, target='kernel')))))
    longer = pj.attach(pj.Lora(rank=2, target='kernel'), model, PARAMS, jnp.zeros((3, WIDTH)))
    wrong('plan 1 was attached with other arguments', lambda: pad(longer))
    small = {**PARAMS, 'down': {'kernel': jnp.zeros((9, 5))}}
    wrong(
        'plan 1 is of another model',
        lambda: pad(pj.attach(pj.Lora(rank=2, target='kernel'), model, small, X[0])),
    )
    padded = pj.pad_ranks([attached(rank=1), attached(rank=3)])
    wrong('a phi for each of 2; got 1', lambda: padded.pad([fresh(0)]))
    wrong('a phi for each of 2; got 3', lambda: padded.cut(pj.stack([fresh(0)] * 3)))
    wrong('phi must be of the model', lambda: padded.pad([fresh(0), fresh(0)]))
    wrong('phi must be of the model', lambda: padded.cut(pj.stack([fresh(0)] * 2)))
    phi, scales = fresh(0, padded.members[1]), dict.fromkeys(padded.scales, 2.0)
    lacking = {'up/kernel': 2.0}
    wrong("one scalar .* got none at 'down/kernel'", lambda: padded.scaled(phi, lacking))
    wrong(r"got shape \(\) at 'UP'", lambda: padded.scaled(phi, {**scales, 'UP': 2.0}))
    wrong(r"got shape \(2,\) at 'down/kernel'", lambda: padded.scaled(phi, padded.scales))
