"""Rows, packed and not: the same losses, whatever lies beside an example."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit
from zoo import normal

from peftjax.data import LanguageBatch, Sample, one_per_row, pack
from peftjax.losses import next_token_loss

VOCABULARY, WIDTH, LENGTH = 11, 8, 16


def samples(count: int, most: int = LENGTH, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, most + 1, count)
    return [
        Sample(rng.integers(0, VOCABULARY, n).astype(np.int32), rng.random(n) < 0.7) for n in sizes
    ]


PARAMS = {
    'embed': normal(0, VOCABULARY, WIDTH),
    'place': normal(1, LENGTH, WIDTH),
    'qkv': normal(2, 3, WIDTH, WIDTH, fan=WIDTH),
    'head': normal(3, WIDTH, VOCABULARY),
}


def loss(params: Any, batch: LanguageBatch) -> Any:
    """A model of one layer of causal attention within segments."""
    x = params['embed'][batch.input_ids] + params['place'][batch.positions]
    q, k, v = (x @ w for w in params['qkv'])
    same = batch.segment_ids[:, :, None] == batch.segment_ids[:, None, :]
    scores = jnp.where(same & np.tri(x.shape[1], dtype=bool), q @ k.mT, -1e9)
    x = x + jax.nn.softmax(scores) @ v
    return next_token_loss(x, params['head'], batch.targets)


def test_packed_losses_and_gradients_are_those_of_each_example_alone():
    own = samples(9)
    packed, alone = pack(own, LENGTH), one_per_row(own, LENGTH)
    assert len(packed) < len(alone)
    one, other = (
        jax.tree.map(jnp.asarray, r.batch(range(len(r)), len(r))) for r in (packed, alone)
    )
    both = jit(jax.value_and_grad(lambda params, batch: loss(params, batch).total))
    got, wanted = both(PARAMS, one), both(PARAMS, other)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())
    assert int(loss(PARAMS, one).count) == sum(s.learned[1:].sum() for s in own)
    # the model would notice: without segments the losses are others
    leaky = one._replace(segment_ids=jnp.ones_like(one.segment_ids))
    assert abs(float(loss(PARAMS, leaky).total - got[0])) > 1e-2
    # and what stands beside an example has no say
    (row,) = (r for r in packed.layout if 0 in r)
    changed = [s if i == 0 else s._replace(ids=(s.ids + 1) % 11) for i, s in enumerate(own)]
    place = packed.layout.index(row)
    rows = [pack(some, LENGTH).batch([place], 1) for some in (own, changed)]
    first = jit(jax.grad(_first), static_argnums=2)
    grads = [first(PARAMS['embed'], b, row.index(0) + 1) for b in rows]
    assert len(row) > 1
    said = np.unique(own[0].ids)
    others = np.setdiff1d(np.arange(VOCABULARY), said)
    assert not grads[0][others].any() and grads[0][said].any()
    np.testing.assert_array_equal(*grads)


def _first(embed: Any, batch: LanguageBatch, segment: int) -> Any:
    """The loss of one example of the row alone."""
    kept = jnp.where(batch.segment_ids == segment, batch.targets, -100)
    return loss({**PARAMS, 'embed': embed}, batch._replace(targets=kept)).total


def test_a_row_is_what_its_samples_say():
    first = Sample(np.array([5, 6, 7]), np.array([True, False, True]))
    second = Sample(np.array([8, 9]), np.array([True, True]))
    batch = pack([second, first], 6, pad_id=3).batch([0], 2)
    assert batch.input_ids.tolist() == [[8, 9, 5, 6, 7, 3], [3] * 6]
    assert batch.targets.tolist() == [[9, -100, -100, 7, -100, -100], [-100] * 6]
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2, 0], [0] * 6]
    assert batch.segment_ids.tolist() == [[1, 1, 2, 2, 2, 0], [0] * 6]
    assert {array.dtype for array in batch} == {np.dtype('int32')}


def test_packing_holds_every_sample_once_and_wastes_little():
    own = samples(500, seed=3)
    packed = pack(own, 2 * LENGTH)
    held = Counter(i for row in packed.layout for i in row)
    assert held == dict.fromkeys(range(500), 1)
    sizes = [sum(len(own[i].ids) for i in row) for row in packed.layout]
    assert max(sizes) <= 2 * LENGTH
    assert len(packed) == -(-sum(sizes) // (2 * LENGTH))  # no packing has fewer rows
    assert packed.layout == pack(own, 2 * LENGTH).layout


def test_the_fingerprint_tells_all_apart():
    own = samples(4)
    rows = [
        one_per_row(own, LENGTH),
        pack(own, LENGTH),
        one_per_row(own, LENGTH + 1),
        one_per_row(own, LENGTH, pad_id=1),
        one_per_row(own[:3], LENGTH),
        one_per_row([*own[:3], own[3]._replace(learned=~own[3].learned)], LENGTH),
    ]
    assert len({r.fingerprint() for r in rows}) == len(rows)
    assert rows[0].fingerprint() == one_per_row(samples(4), LENGTH).fingerprint()


@pytest.mark.parametrize('lay', [one_per_row, pack])
def test_errors(lay: Any):
    with pytest.raises(ValueError, match='at least one sample'):
        lay([], 4)
    with pytest.raises(ValueError, match='length 4 cannot hold sample 1 of 5 tokens.*max_tokens'):
        lay([Sample(np.zeros(n, np.int32), np.ones(n, bool)) for n in (3, 5)], 4)
    with pytest.raises(ValueError, match='sample 1 has none. Leave it out'):
        lay([Sample(np.zeros(n, np.int32), np.ones(n, bool)) for n in (3, 0)], 4)
