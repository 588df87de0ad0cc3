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
