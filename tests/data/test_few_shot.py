"""Few-shot samples and epochs equal their definitions."""

import numpy as np
import pytest

from peftjax.data import Examples, default_messages, epochs, few_shot, in_order, shot_indices

TOY = Examples(tuple('abcdefg'), np.array([2, 0, 1, 2, 0, 1, 2]), ('x', 'y', 'z'))


@pytest.mark.parametrize('seed', range(5))
def test_sample_equals_the_definition(seed):
    train, _ = default_messages()
    y = np.array([train.names[label] for label in train.labels])
    rng = np.random.default_rng(seed)
    expected = np.concatenate(
        [rng.choice(np.flatnonzero(y == label), 10, replace=False) for label in sorted(set(y))]
    )
    np.testing.assert_array_equal(shot_indices(train, 10, seed), expected)
    sample = few_shot(train, 10, seed)
    assert sample.texts == tuple(train.texts[i] for i in expected)
    assert sample.names == train.names
    np.testing.assert_array_equal(sample.labels, np.repeat(np.arange(7), 10))


def test_seeds_differ():
    train, _ = default_messages()
    assert set(few_shot(train, 10, 0).texts) != set(few_shot(train, 10, 1).texts)


def test_a_class_with_too_few_is_named():
    with pytest.raises(ValueError, match="at least shots=3 examples: 'x' has 2"):
        few_shot(TOY, 3, 0)


def test_a_class_with_none_is_named():
    with pytest.raises(ValueError, match="at least shots=1 examples: 'w' has 0"):
        few_shot(Examples(TOY.texts, TOY.labels, (*TOY.names, 'w')), 1, 0)


def test_shots_must_be_positive():
    with pytest.raises(ValueError, match='shots must be at least 1: received 0'):
        few_shot(TOY, 0, 0)


def test_epochs_equal_the_definition():
    rng = np.random.default_rng(1003)
    orders = [rng.permutation(10) for _ in range(3)]
    expected = [order[start : start + 4] for order in orders for start in (0, 4, 8)]
    received = list(epochs(10, batch=4, seed=3, epochs=3))
    assert len(received) == len(expected) == 9
    for got, want in zip(received, expected, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(('n', 'sizes'), [(8, [4, 4]), (3, [3]), (9, [4, 4, 1])])
def test_batch_sizes(n, sizes):
    assert [len(index) for index in epochs(n, batch=4, seed=0, epochs=1)] == sizes
    ordered = list(in_order(n, batch=4))
    assert [len(index) for index in ordered] == sizes
    np.testing.assert_array_equal(np.concatenate(ordered), np.arange(n))


def test_no_epochs_are_no_batches():
    assert list(epochs(5, batch=2, seed=0, epochs=0)) == []


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match='received n=0, batch=2'):
        epochs(0, batch=2, seed=0, epochs=1)
    with pytest.raises(ValueError, match='received n=3, batch=0'):
        in_order(3, batch=0)
    with pytest.raises(ValueError, match='epochs must not be negative: received -1'):
        epochs(3, batch=2, seed=0, epochs=-1)
