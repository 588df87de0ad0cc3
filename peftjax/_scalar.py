"""A loss is one number."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax._types import Array


def scalar(loss: Any) -> Array:
    """What a loss function gave, as an array.

    Args:
      loss: a scalar of JAX or NumPy.

    Raises:
      TypeError: it is something else, as a pair with what is beside the loss, or one for each row.
    """
    if isinstance(loss, jax.Array | np.ndarray | np.generic) and jnp.ndim(loss) == 0:
        return jnp.asarray(loss)
    shape = f' of shape {jnp.shape(loss)}' if isinstance(loss, jax.Array) else ''
    raise TypeError(
        f'a loss must be a scalar, or a pj.Loss: received {type(loss).__name__}{shape}. Take a '
        'mean, and leave out what is beside it'
    )
