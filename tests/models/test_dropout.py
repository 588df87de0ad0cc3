"""Dropout drawn from bytes: the rate is exact, and no two places go together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax.models._dropout import Dropout, keep


@pytest.mark.parametrize('rate', [0.1, 0.25, 0.5, 0.999])
def test_the_rate_is_exact_though_a_byte_is_coarse(rate):
    """0.1 lies between 25/256 and 26/256: five standard errors tell them apart here."""
    rows, width = 12000, 601
    kept = np.asarray(keep(jax.random.key(0), rate, (rows, width)))
    error = np.sqrt(rate * (1 - rate) / kept.size)
    assert abs(kept.mean() - (1 - rate)) < 5 * error
    assert 10 * error < 1 / 512


def test_neighbors_are_independent():
    kept = np.asarray(keep(jax.random.key(1), 0.1, (2000, 401))).astype(float)
    shape = kept[:, 1:]
    for shift in (1, 2, 3, 4, 5):
        pair = np.corrcoef(shape[:, shift:].ravel(), shape[:, :-shift].ravel())[0, 1]
        assert abs(pair) < 5 / np.sqrt(shape.size)


def test_nothing_and_everything():
    assert keep(jax.random.key(0), 0.0, (7,)).all()
    assert not keep(jax.random.key(0), 1.0, (7,)).any()


def test_the_module_scales_what_it_keeps_and_its_gradient():
    x = jnp.arange(1.0, 4001, dtype=jnp.bfloat16).reshape(40, 100)
    run = lambda x: Dropout(0.5).apply({}, x, False, rngs={'dropout': jax.random.key(3)})
    y, slope = run(x), jax.grad(lambda x: run(x).astype(jnp.float32).sum())(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, jnp.where(y != 0, x * 2, 0))
    np.testing.assert_array_equal(slope, jnp.where(y != 0, 2, 0).astype(jnp.bfloat16))
    np.testing.assert_array_equal(Dropout(0.5).apply({}, x, True), x)
    assert 0.4 < float((y == 0).mean()) < 0.6
