"""Few-shot tasks: what is drawn, that it can be taken up again, and what is refused."""

import itertools
import json

import numpy as np
import pytest

from peftjax.data import Episodes, episode

LABELS = np.random.default_rng(0).permutation(np.repeat([3, 5, 8, 11, 12, 40], 7))
NUMBERS = {'ways': 4, 'shots': 2, 'queries': 3, 'tasks': 5}


def make(labels=LABELS, **other):
    return Episodes(labels, **{**NUMBERS, 'seed': 1, **other})


def bits(episodes, count):
    return [
        np.concatenate([np.ravel(x) for half in one for x in half]).tobytes()
        for one in itertools.islice(episodes, count)
    ]


def test_tasks_are_what_their_numbers_say():
    seen = set()
    for support, query in itertools.islice(make(), 20):
        assert support.inputs.shape == support.labels.shape == (5, 8)
        assert query.inputs.shape == query.labels.shape == (5, 12)
        assert {x.dtype for half in (support, query) for x in half} == {np.dtype(np.int32)}
        for i in range(5):
            drawn = np.concatenate([support.inputs[i], query.inputs[i]])
            assert len(set(drawn.tolist())) == 20
            # one class for each label, the same in support and query
            pairs = {*zip(support.labels[i], LABELS[support.inputs[i]], strict=True)}
            assert pairs == {*zip(query.labels[i], LABELS[query.inputs[i]], strict=True)}
            assert len(pairs) == 4 and {label for label, _ in pairs} == {0, 1, 2, 3}
            assert len({name for _, name in pairs}) == 4
            assert np.bincount(support.labels[i]).tolist() == [2] * 4
            assert np.bincount(query.labels[i]).tolist() == [3] * 4
            seen.update(drawn.tolist())
    assert seen == set(range(len(LABELS)))


def test_the_seed_says_what_comes_and_no_two_are_alike():
    first, again, other = (bits(make(seed=seed), 10) for seed in (1, 1, 2))
    assert first == again and not set(first) & set(other) and len(set(first)) == 10
    tasks = next(make()).support.inputs
    assert len({row.tobytes() for row in tasks}) == len(tasks)


def test_everything_is_as_likely():
    """A class, an example of a class and which half it is in, whatever the size of the class."""
    labels = np.repeat([0, 1, 2, 3], [3, 4, 3, 9])
    tasks = 20_000
    support, query = next(Episodes(labels, ways=3, shots=1, queries=2, tasks=tasks, seed=0))
    for drawn, count in ((support.inputs, 1), (query.inputs, 2)):
        times = np.bincount(drawn.ravel(), minlength=len(labels))
        wanted = tasks * 3 / 4 * count / np.repeat([3, 4, 3, 9], [3, 4, 3, 9])
        assert (abs(times - wanted) < 5 * wanted**0.5).all()
    # which class is first, and the order of a query's two
    first = np.bincount(labels[support.inputs[:, 0]])
    assert (abs(first - tasks / 4) < 5 * (tasks / 4) ** 0.5).all()
    rising = (query.inputs[:, ::2] < query.inputs[:, 1::2]).mean()
    assert abs(rising - 0.5) < 5 * 0.5 / (3 * tasks) ** 0.5


@pytest.mark.parametrize('seen', [0, 1, 7])
def test_it_goes_on_where_it_stood(seen):
    episodes = make()
    bits(episodes, seen)
    state = json.loads(json.dumps(episodes.state()))
    rest, fresh = bits(episodes, 4), make()
    bits(fresh, 2)
    fresh.restore(state)
    assert bits(fresh, 4) == rest


def test_rows_are_made_of_positions():
    images = np.arange(len(LABELS) * 6).reshape(-1, 2, 3)
    support, query = next(make(rows=lambda index: {'image': images[index]}))
    bare = next(make())
    assert support.inputs['image'].shape == (5, 8, 2, 3)
    assert (query.inputs['image'] == images[bare.query.inputs]).all()


def test_a_state_of_other_episodes_is_refused():
    state = make().state()
    for other, name in (
        (make(shots=1), 'shots'),
        (make(seed=3), 'seed'),
        (make(labels=LABELS[::-1].copy()), 'labels'),
    ):
        with pytest.raises(ValueError, match=f'of other episodes: {name} was .* and is'):
            other.restore(state)
    del state['drawn']  # as it was before episodes were drawn side by side
    with pytest.raises(ValueError, match='drawn was None and is 2'):
        make().restore(state)


@pytest.mark.parametrize(
    ('how', 'said'),
    [
        ({'ways': 7}, r'ways=7 needs as many classes: there are 6'),
        ({'queries': 6}, r'shots \+ queries = 8 examples: class 3 has 7 \(6 of 6 classes'),
        # the sum of two of these is 2 in their own eight bits
        (
            {'shots': np.uint8(128), 'queries': np.uint8(130)},
            r'shots \+ queries = 258 examples: class 3 has 7',
        ),
        ({'shots': 0}, 'shots must be at least 1: received 0'),
        ({'tasks': 0}, 'tasks must be at least 1: received 0'),
        ({'labels': LABELS / 2}, r'one integer for each example: received float64 .* Number them'),
        ({'labels': LABELS.reshape(6, 7)}, r'received int64 of shape \(6, 7\)'),
    ],
)
def test_what_cannot_be_drawn_is_refused(how, said):
    with pytest.raises(ValueError, match=said):
        make(**how)


@pytest.mark.parametrize('how', [{'ways': 2.5}, {'tasks': True}, {'seed': None}, {'seed': 1.5}])
def test_numbers_that_are_no_integers_are_refused(how):
    with pytest.raises(TypeError, match=f'{next(iter(how))} must be an integer'):
        make(**how)


def test_integers_of_numpy_are_those_of_python():
    own = {'ways': np.int64(2), 'seed': np.int32(3)}
    made = make(**own)
    other = make(**{name: int(number) for name, number in own.items()})
    assert json.loads(json.dumps(made.state())) == other.state()
    np.testing.assert_array_equal(next(made).query.inputs, next(other).query.inputs)
    with pytest.raises(ValueError, match="the state's next must be at least 0: received -5"):
        made.restore({**made.state(), 'next': -5})
    with pytest.raises(ValueError, match='seed must be at least 0: received -1'):
        make(seed=-1)
    with pytest.raises(TypeError, match="the state's next must be an integer: received None"):
        made.restore({name: own for name, own in made.state().items() if name != 'next'})


def test_a_task_of_chosen_examples():
    support, query = episode([7, 8, 8, 9, 7, 9], support=[5, 0], query=[4, 3])
    assert support.labels.tolist() == [1, 0] and query.labels.tolist() == [0, 1]
    assert support.inputs.tolist() == [5, 0] and query.inputs.dtype == np.int32


@pytest.mark.parametrize(
    ('support', 'query', 'said'),
    [
        ([0, 1], [4, 3], r'each class of the query; it has none of \[9\], only of \[7, 8\]'),
        ([0, 1], [1, 4], r'in support and query: \[1\] are'),
        ([0, 0], [4], r'support must not have an example twice: received \[0, 0\]'),
        ([0, 9], [4], 'support must be positions from 0 to 5: received 0 to 9'),
        ([0], [-1], 'query must be positions from 0 to 5: received -1 to -1'),
        ([0], [], 'query must be a list of positions, at least one'),
    ],
)
def test_a_task_that_is_none_is_refused(support, query, said):
    with pytest.raises(ValueError, match=said):
        episode([7, 8, 8, 9, 7, 9], support, query)
