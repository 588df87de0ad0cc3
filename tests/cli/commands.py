"""Commands, run in this process."""

import jax

from peftjax import cli


def call(*arguments: object) -> int:
    """Runs a command; optax's schedules rely on promotion."""
    with jax.numpy_dtype_promotion('standard'):
        return cli.main([str(argument) for argument in arguments])
