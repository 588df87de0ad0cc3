"""The order of batches: reproducible, and taken up again at any one."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from test_rows import LENGTH, samples

from peftjax.data import Batches, one_per_row, pack

OWN = samples(11, most=6)
LAYOUTS = {'one per row': one_per_row(OWN, LENGTH), 'packed': pack(OWN, LENGTH)}
every = pytest.mark.parametrize('name', LAYOUTS)


def taken(batches: Batches) -> list[Any]:
    return [[array.tolist() for array in batch] for batch in batches]


@every
@pytest.mark.parametrize('seed', [7, None])
def test_restored_at_every_step_the_rest_is_identical(name: str, seed: int | None):
    make = lambda: Batches(LAYOUTS[name], 3, seed=seed, epochs=3)
    whole = taken(make())
    unbroken, states = make(), []
    assert len(unbroken) == len(whole)
    for _ in range(len(whole)):
        states.append(json.dumps(unbroken.state()))  # through a file
        next(unbroken)
    states.append(json.dumps(unbroken.state()))
    for step, state in enumerate(states):
        fresh = make()
        fresh.restore(json.loads(state))
        assert taken(fresh) == whole[step:]
        unbroken.restore(json.loads(state))  # back from the end
        assert taken(unbroken) == whole[step:]


def test_every_row_comes_once_an_epoch_in_an_order_of_its_own():
    rows = LAYOUTS['one per row']
    wanted = Counter(row.tobytes() for row in rows.batch(range(11), 11).input_ids)
    orders = []
    batches = Batches(rows, 4, seed=1, epochs=3)
    for _ in range(3):
        epoch = [next(batches) for _ in range(3)]
        assert {array.shape for batch in epoch for array in batch} == {(4, LENGTH)}
        real = [
            row for b in epoch for row, s in zip(b.input_ids, b.segment_ids, strict=True) if s[0]
        ]
        assert Counter(row.tobytes() for row in real) == wanted
        assert not epoch[-1].segment_ids[-1].any() and (epoch[-1].targets[-1] == -100).all()
        orders.append([row.tobytes() for row in real])
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert next(batches, None) is None


def test_the_order_is_of_the_seed():
    rows = LAYOUTS['one per row']
    runs = [taken(Batches(rows, 4, seed=seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    straight = next(Batches(rows, 11, seed=None))
    np.testing.assert_array_equal(straight.input_ids, rows.batch(range(11), 11).input_ids)


def test_more_epochs_go_on_where_fewer_ended():
    rows = LAYOUTS['packed']
    short, long = (Batches(rows, 2, seed=5, epochs=n) for n in (1, 3))
    first = taken(short)
    whole = taken(long)
    assert whole[: len(first)] == first
    long.restore(short.state())
    assert taken(long) == whole[len(first) :]


@pytest.mark.parametrize(
    ('other', 'message'),
    [
        (lambda: Batches(LAYOUTS['packed'], 3, seed=7), r"rows was '\w{64}' and is '\w{64}' now"),
        (lambda: Batches(LAYOUTS['one per row'], 4, seed=7), 'size was 3 and is 4 now'),
        (lambda: Batches(LAYOUTS['one per row'], 3, seed=8), 'seed was 7 and is 8 now'),
    ],
)
def test_the_state_of_another_stream_is_refused(other: Any, message: str):
    state = Batches(LAYOUTS['one per row'], 3, seed=7).state()
    with pytest.raises(ValueError, match=message):
        other().restore(state)


@pytest.mark.parametrize('wrong', [{'size': 0}, {'epochs': 0}])
def test_errors(wrong: dict):
    with pytest.raises(ValueError, match='must be at least 1'):
        Batches(LAYOUTS['packed'], **{'size': 2, 'seed': 0, **wrong})
