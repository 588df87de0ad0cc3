"""The climate of all tests: eight host devices, and no silent promotion of dtypes."""

import os

os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
).strip()

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_dtypes():
    """No operand changes its dtype in silence; examples in docstrings know no such rule."""
    with jax.numpy_dtype_promotion('strict'):
        yield


@pytest.fixture(autouse=True, scope='module')
def forgotten_programs():
    """Compiled programs go with the module whose tests made them.

    Each holds mappings of memory, of which Linux gives a process 65,530; a compiler that gets no
    more crashes, and one process runs two thousand tests.
    """
    yield
    jax.clear_caches()
