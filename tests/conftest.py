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
