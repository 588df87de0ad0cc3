import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from zoo import normal

import peftjax as pj

THETA = {
    'w': jnp.array([[1.5, -0.0], [0.0, -2.5]]),
    'half': jnp.array([-0.0, 3.0], jnp.bfloat16),
    'odd': jnp.array([jnp.inf, -jnp.inf, jnp.nan, 3e38]),
}
PHI = {'w': {'a': normal(1, 2, 1), 'b': normal(2, 1, 2)}}
TREE = {'params': THETA, 'phi': PHI}


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def gradients(step):
    """Gradients that are nowhere zero, for theta too."""
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.1 * (step + 1)), TREE)


@pytest.mark.parametrize(
    'tx',
    [
        optax.adamw(0.1, weight_decay=0.5),
        optax.sgd(0.1, momentum=0.9),
        optax.chain(
            optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.1), optax.lion(0.1)
        ),
    ],
    ids=['adamw', 'momentum', 'chain'],
)
@pytest.mark.parametrize('jit', [False, True])
def test_theta_keeps_every_bit_and_has_no_state(tx, jit):
    masked = pj.masked_optimizer(tx)
    state = masked.init(TREE)

    def step(tree, state, grads):
        with jax.numpy_dtype_promotion('standard'):  # of optax's counts
            updates, state = masked.update(grads, state, tree)
            return optax.apply_updates(tree, updates), state

    step = jax.jit(step) if jit else step
    tree, sizes = TREE, sorted(leaf.shape for leaf in jax.tree.leaves(state))
    for i in range(3):
        tree, state = step(tree, state, gradients(i))
    assert bits(tree['params']) == bits(THETA)
    assert all(
        (a != b).any() for a, b in zip(*map(jax.tree.leaves, (tree['phi'], PHI)), strict=True)
    )
    alone = sorted(leaf.shape for leaf in jax.tree.leaves(tx.init(PHI)))
    assert sizes == alone


def test_phi_is_trained_as_by_the_optimizer_alone():
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.5, momentum=0.9))
    masked = pj.masked_optimizer(tx)
    tree, state, phi, alone = TREE, masked.init(TREE), PHI, tx.init(PHI)
    for i in range(3):
        updates, state = masked.update(gradients(i), state, tree)
        tree = optax.apply_updates(tree, updates)
        updates, alone = tx.update(gradients(i)['phi'], alone, phi)
        phi = optax.apply_updates(phi, updates)
    assert bits(tree['phi']) == bits(phi)


def test_whole_numbers_stay():
    tree = {'params': {'steps': jnp.arange(3)}, 'phi': PHI}
    masked = pj.masked_optimizer(optax.sgd(0.1))
    loss = lambda tree: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(tree['phi']))
    grads = jax.grad(loss, allow_int=True)(tree)
    updates, _ = masked.update(grads, masked.init(tree), tree)
    new = optax.apply_updates(tree, updates)
    assert bits(new['params']) == bits(tree['params'])
    assert new['params']['steps'].dtype == tree['params']['steps'].dtype


@pytest.mark.parametrize(
    ('tree', 'match'),
    [
        (
            {'theta': THETA, 'phi': PHI},
            r"tree must be {'params': …, 'phi': …}; got \['phi', 'theta'\]",
        ),
        ({**TREE, 'step': jnp.zeros(())}, r"got \['params', 'phi', 'step'\]"),
        ((THETA, PHI), 'got tuple'),
    ],
)
def test_another_tree_is_refused(tree, match):
    with pytest.raises(ValueError, match=match):
        pj.masked_optimizer(optax.sgd(0.1)).init(tree)


CHAIN = {'lora': PHI, 'head': {'out/kernel': {'value': normal(3, 2, 2)}}}


def walk(tx, phi, steps=3):
    """Phi after steps whose gradients differ from leaf to leaf and from step to step."""
    state = tx.init(phi)
    for _ in range(steps):
        grads = jax.tree.map(lambda x: jnp.sin(3 * x), phi)
        with jax.numpy_dtype_promotion('standard'):  # of optax's counts
            updates, state = tx.update(grads, state, phi)
        phi = optax.apply_updates(phi, updates)
    return phi


def adamw(rate):
    return optax.adamw(optax.linear_schedule(rate, 0.1 * rate, 3), weight_decay=0.1)


def test_a_chain_has_an_optimizer_for_each_of_its_methods():
    own = pj.chain_optimizer({'lora': adamw(1e-2), 'head': optax.sgd(0.1, momentum=0.9)})
    found = walk(optax.chain(optax.clip_by_global_norm(0.5), own), CHAIN)
    labels = {'lora': {'w': {'a': 1, 'b': 1}}, 'head': {'out/kernel': {'value': 2}}}
    by_hand = optax.partition({1: adamw(1e-2), 2: optax.sgd(0.1, momentum=0.9)}, labels)
    assert bits(found) == bits(walk(optax.chain(optax.clip_by_global_norm(0.5), by_hand), CHAIN))
    alone = walk(pj.chain_optimizer({'lora': adamw(1e-2), 'head': optax.set_to_zero()}), CHAIN)
    assert bits(alone) == bits({'lora': walk(adamw(1e-2), PHI), 'head': CHAIN['head']})


@pytest.mark.parametrize(
    ('optimizers', 'match'),
    [
        ({'lora': 0.1}, r"keys \['head', 'lora'\]; without one: \['head'\], without a key: \[\]"),
        ({'lora': 0.1, 'haed': 0.1}, r"without one: \['head'\], without a key: \['haed'\]"),
        ({'lora': 0.1, 'head': 0.1, 'ia3': 0.1}, r"one: \[\], without a key: \['ia3'\]"),
    ],
)
def test_optimizers_must_be_those_of_the_chain(optimizers, match):
    tx = pj.chain_optimizer({name: optax.sgd(rate) for name, rate in optimizers.items()})
    with pytest.raises(ValueError, match=match):
        tx.init(CHAIN)


@pytest.mark.parametrize('ratio', [16.0, 3.0])
@pytest.mark.parametrize('make', [adamw, optax.sgd, optax.lion])
def test_lora_plus_is_a_rate_of_its_own_for_b(make, ratio):
    found = walk(optax.chain(make(1e-2), pj.lora_plus(ratio)), CHAIN)
    names = lambda path, _: 'b' if path[-1].key == 'b' else 'rest'
    labels = lambda phi: jax.tree_util.tree_map_with_path(names, phi)
    by_hand = walk(optax.partition({'b': make(1e-2 * ratio), 'rest': make(1e-2)}, labels), CHAIN)
    if ratio == 16 and make is not adamw:  # nothing is rounded; optax compiles Adam by the tree
        assert bits(found) == bits(by_hand)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, found, by_hand)
    plain = walk(make(1e-2), CHAIN)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), found, plain)
    assert same['head']['out/kernel']['value'] and same['lora']['w']['a']
    assert not same['lora']['w']['b']


def test_lora_plus_finds_the_pairs_of_real_methods_and_nothing_else():
    """Parameters and methods are called a and b here, too."""
    params = {'a': normal(0, 4, 4), 'b': normal(1, 4, 4)}
    model = lambda params, x: jnp.tanh(x @ params['a']) @ params['b']
    inner = pj.chain(a=pj.Ia3(target='a'), b=pj.Dora(rank=2, target='b'))
    method = pj.chain(pj.Lora(rank=2, target='a'), inner=inner)
    phi = pj.attach(method, model, params, jnp.ones((2, 4))).init(jax.random.key(0), params)
    tx = pj.lora_plus(8)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, phi), tx.init(phi))
    scaled = [
        jax.tree_util.keystr(path, simple=True, separator='.')
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
        if (leaf == 8).all()
    ]
    assert scaled == ['inner.b.b.b', 'lora.a.b']
    assert sum(leaf.size for leaf in jax.tree.leaves(updates)) == sum(
        int(((leaf == 1) | (leaf == 8)).sum()) for leaf in jax.tree.leaves(updates)
    )


def test_lora_plus_for_one_method_of_a_chain():
    both = {'lora': optax.chain(optax.sgd(0.1), pj.lora_plus(4)), 'head': optax.sgd(0.1)}
    assert bits(walk(pj.chain_optimizer(both), CHAIN)) == bits(
        walk(optax.chain(optax.sgd(0.1), pj.lora_plus(4)), CHAIN)
    )
    wrong = pj.chain_optimizer({'lora': optax.sgd(0.1), 'head': pj.lora_plus(4)})
    with pytest.raises(ValueError, match='there are none, the keys are'):
        wrong.init(CHAIN)


def test_lora_plus_says_what_it_needs():
    with pytest.raises(ValueError, match=r"pairs of a and b, .* keys are \['out/kernel'\]"):
        pj.lora_plus(16).init(CHAIN['head'])
    for ratio in (0, -1.0, float('inf'), float('nan')):
        with pytest.raises(ValueError, match='ratio must be a positive number: received'):
            pj.lora_plus(ratio)


def test_lora_plus_keeps_the_dtype():
    phi = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PHI)
    updates, _ = pj.lora_plus(16).update(phi, optax.EmptyState())
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


def test_optax_can_tell_which_parts_of_the_state_are_of_phi():
    """As placing a state on a mesh asks."""
    each = {'lora': optax.chain(optax.adam(0.1), pj.lora_plus(4)), 'head': optax.adam(0.1)}
    tx = pj.moving_average(pj.chain_optimizer(each), decay=0.9)
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    like = lambda kept, of: kept if is_masked(kept) else kept.shape == of.shape
    found = optax.tree.map_params(
        tx, like, tx.init(CHAIN), CHAIN, transform_non_params=lambda _: None, is_leaf=is_masked
    )
    assert jax.tree.leaves(found) == [True] * 9  # two moments and an average of three arrays
