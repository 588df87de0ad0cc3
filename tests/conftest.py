"""The climate of all tests: eight host devices, and no silent promotion of dtypes."""

import os

os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
).strip()

import jax

jax.config.update('jax_numpy_dtype_promotion', 'strict')
