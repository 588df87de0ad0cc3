"""Prototypes against their definition, and a space that is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
import small

import peftjax as pj
from peftjax import data

KEY = jax.random.key(0)
PARAMS = {'w': small.drawn(0, 4, 5)}
PHI = {'w': small.drawn(1, 4, 5) / 4}


def embed(params, phi, x, key):
    del key
    return jnp.tanh(x @ (params['w'] + phi['w']))


def tasks(count=2, ways=3, shots=2, queries=3):
    half = lambda seed, each: (
        small.drawn(seed, count, ways * each, 4),
        jnp.tile(jnp.repeat(jnp.arange(ways), each), (count, 1)),
    )
    return half(5, shots), half(6, queries)


def by_hand(task, ways, distance, scale):
    """In numpy, a query at a time."""
    (x, labels), (asked, wanted) = jax.tree.map(np.asarray, task)
    at = lambda x: np.tanh(x @ np.asarray(PARAMS['w'] + PHI['w']))
    means = np.stack([at(x)[labels == way].mean(0) for way in range(ways)])
    losses = []
    for vector, label in zip(at(asked), wanted, strict=True):
        if distance == 'euclidean':
            near = -((vector - means) ** 2).sum(-1)
        else:
            near = means @ vector / np.linalg.norm(means, axis=-1) / np.linalg.norm(vector)
        said = np.exp(scale * near)
        losses.append(-np.log(said[label] / said.sum()))
    return means, np.mean(losses)


@pytest.mark.parametrize(('distance', 'scale'), [('euclidean', 1.0), ('cosine', 10.0)])
def test_it_is_what_the_definition_says(distance, scale):
    net = pj.meta.prototypical(embed, ways=3, distance=distance, scale=scale)
    every = tasks()
    wanted = [by_hand(small.task(every, i), 3, distance, scale) for i in range(2)]
    found = quick.jit(net.loss)(PARAMS, PHI, every, KEY)
    np.testing.assert_allclose(found, np.mean([loss for _, loss in wanted]), rtol=1e-5)
    support, (asked, labels) = small.task(every, 1)
    means = net.adapt(PARAMS, PHI, support, KEY)
    np.testing.assert_allclose(means, wanted[1][0], atol=1e-6)
    said = jax.nn.log_softmax(net.classify(PARAMS, PHI, means, asked, KEY))
    loss = -np.asarray(said)[np.arange(9), np.asarray(labels)].mean()
    np.testing.assert_allclose(loss, wanted[1][1], rtol=1e-5)


def test_a_space_is_trained_by_the_librarys_own_step():
    """Classes differ in one direction of many; what is drawn is noise but for that."""
    rng = np.random.default_rng(0)
    names = np.repeat(np.arange(12), 20)
    x = rng.normal(size=(240, 8)).astype(np.float32) * 2
    x[:, 0] = names + 0.1 * rng.normal(size=240)
    base = {'kernel': small.drawn(1, 8, 8) / 3}
    forward, phi = pj.lora_wrap(
        lambda p, x: x @ p['kernel'], base, x[:2], key=KEY, rank=2, target='kernel'
    )
    net = pj.meta.prototypical(lambda p, phi, x, key: forward(p, phi, x), ways=4)
    episodes = data.Episodes(
        names, ways=4, shots=3, queries=5, tasks=2, seed=0, rows=lambda index: x[index]
    )
    tx, losses = optax.adam(0.03), []
    step, state = pj.train_step(net.loss, tx), pj.start(tx, phi, KEY)
    with jax.numpy_dtype_promotion('standard'):  # of Adam
        state = pj.fit(step, base, state, episodes, steps=80, on_loss=lambda _, x: losses.append(x))
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:10])
    right = []
    for _ in range(10):
        support, query = (small.task(half, 0) for half in next(episodes))
        means = net.adapt(base, state.phi, support, KEY)
        said = net.classify(base, state.phi, means, query.inputs, KEY).argmax(-1)
        right.append((said == query.labels).mean())
    assert np.mean(right) > 0.8


def test_half_precision_is_summed_in_float32():
    x = (100 + small.drawn(0, 300, 2)).astype(jnp.bfloat16)
    means = pj.meta.prototypes(x, jnp.zeros(300, jnp.int32), 1)
    assert means.dtype == jnp.bfloat16
    np.testing.assert_allclose(means.astype(jnp.float32), [[100.0, 100.0]], atol=0.3)
    assert pj.meta.logits(x, means).dtype == jnp.float32


def test_a_cosine_of_nothing_has_a_derivative():
    x = jnp.zeros((1, 3))
    slope = jax.grad(lambda x: pj.meta.logits(x, jnp.eye(3), distance='cosine').sum())(x)
    assert bool(jnp.isfinite(slope).all())


def test_a_support_without_a_class_is_refused_or_nan_where_none_can_know():
    x, labels = jnp.ones((3, 2)), jnp.array([0, 2, 2])
    with pytest.raises(ValueError, match=r'each of 4 classes; it has none of \[1, 3\]'):
        pj.meta.prototypes(x, labels, 4)
    found = jax.jit(pj.meta.prototypes, static_argnums=2)(x, labels, 4)
    assert jnp.isnan(found).all(-1).tolist() == [False, True, False, True]
    net = pj.meta.prototypical(embed, ways=4)
    with pytest.raises(ValueError, match=r'each of 4 classes; it has none of \[1, 3\]'):
        net.adapt(PARAMS, PHI, (small.drawn(2, 3, 4), np.array([0, 2, 2])), KEY)


def test_a_label_that_is_none_is_refused_or_nan_where_none_can_know():
    x, labels = jnp.ones((4, 2)), jnp.array([0, 1, 2, -2])
    for ways in (2, 3):
        with pytest.raises(ValueError, match=rf'from 0 to {ways - 1}, or -1: received \[-2'):
            pj.meta.prototypes(x, labels, ways)
        found = jax.jit(pj.meta.prototypes, static_argnums=2)(x, labels, ways)
        assert jnp.isnan(found).all()


def test_rows_of_a_query_that_only_fill_up_do_not_count():
    net, few = pj.meta.prototypical(embed, ways=3), jnp.tile(jnp.arange(3), 2)
    x, labels = small.drawn(2, 6, 4), jnp.array([0, 1, 2, 0, 1, -1])
    one = lambda *own: tuple(leaf[None] for leaf in own)
    loss = lambda x, labels: net.loss(
        PARAMS, PHI, (one(small.drawn(3, 6, 4), few), one(x, labels)), KEY
    )
    np.testing.assert_allclose(loss(x, labels), loss(x[:5], labels[:5]), rtol=1e-6)
    assert loss(x, jnp.full(6, -1)) == 0  # a task that only fills up
    assert jnp.isnan(loss(x, labels.at[0].set(3))) and jnp.isnan(loss(x, labels.at[0].set(-2)))
    with pytest.raises(ValueError, match=r'labels of a query .* int32 of shape \(1,\) for 6 rows'):
        loss(x, labels[:1])
    with pytest.raises(ValueError, match=r'labels of a query .* float32 of shape'):
        loss(x, labels.astype(jnp.float32))


@pytest.mark.parametrize(
    ('call', 'error', 'said'),
    [
        (lambda: pj.meta.prototypical(embed, ways=1), ValueError, 'ways must be at least 2'),
        (
            lambda: pj.meta.prototypical(embed, ways=2, scale=0),
            ValueError,
            'scale must be a positive',
        ),
        (lambda: pj.meta.prototypical(embed, ways=2, scale=jnp.inf), ValueError, 'received inf'),
        (lambda: pj.meta.prototypical(embed, ways=2.5), TypeError, 'ways must be an integer'),
        (
            lambda: pj.meta.prototypes(jnp.ones((2, 2), jnp.int32), jnp.arange(2), 2),
            ValueError,
            'embeddings must be floats: received int32',
        ),
        (
            lambda: pj.meta.prototypical(embed, ways=3).adapt(
                PARAMS, PHI, (jnp.ones((3, 4)), jnp.zeros((3, 1), jnp.int32)), KEY
            ),
            ValueError,
            r'labels must be integers \(rows,\): received int32 of shape \(3, 1\)',
        ),
        (
            lambda: pj.meta.prototypical(embed, ways=2, distance='manhattan'),
            ValueError,
            "distance must be 'euclidean' or 'cosine': received 'manhattan'",
        ),
        (
            lambda: pj.meta.prototypes(jnp.ones((3, 2)), jnp.ones(2, jnp.int32), 2),
            ValueError,
            r'embeddings must be \(rows, width\).*received \(3, 2\) and \(2,\)',
        ),
        (
            lambda: pj.meta.logits(jnp.ones((3, 2)), jnp.ones((2, 4))),
            ValueError,
            r'prototypes \(ways, width\): received \(3, 2\) and \(2, 4\)',
        ),
        (
            lambda: pj.meta.prototypical(embed, ways=3).adapt(PARAMS, PHI, jnp.ones((2, 4)), KEY),
            TypeError,
            r'the support must be a pair \(inputs, labels\)',
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, error, said):
    with pytest.raises(error, match=said):
        call()


@pytest.mark.parametrize('distance', ['euclidean', 'cosine'])
def test_products_are_in_full_precision_on_accelerators_too(distance):
    x, labels = small.drawn(7, 6, 4), jnp.tile(jnp.arange(3), 2)

    def run(x):
        means = pj.meta.prototypes(x, labels, 3)
        return pj.meta.logits(x, means, distance=distance)

    text = jax.jit(run).lower(x).as_text()
    dots = [line for line in text.splitlines() if 'dot_general' in line]
    assert len(dots) == (2 if distance == 'cosine' else 1)
    assert all(line.count('HIGHEST') == 2 for line in dots)
