"""Several processes that run one program on one mesh, as `jax.distributed` starts them.

What changes a folder is done by the first process while the others wait; what reads arrays is done
by all of them, each with its own part.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


class ElsewhereError(RuntimeError):
    """The first process could not do something that the others wait for."""


def several() -> bool:
    """Whether there are more processes than this one."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this process is the one that changes folders and speaks."""
    return jax.process_index() == 0


def meet(where: str) -> None:
    """Waits until all processes are here."""
    if several():
        multihost_utils.sync_global_devices(where)


def led(what: str, do: Callable[[], Any]) -> Any:
    """Lets the first process do something, and all go on together.

    Args:
      what: for the error of the others.
      do: what is done.

    Returns:
      What `do` gives; None in the others.

    Raises:
      ElsewhereError: in the others, where `do` raised in the first, as it does there.
    """
    if not several():
        return do()
    result, error = None, None
    if first():
        try:
            result = do()
        except BaseException as raised:  # raised again, once the others know
            error = raised
    failed = told(error is not None)
    if error is not None:
        raise error
    if failed:
        raise ElsewhereError(f'the first process could not {what}; its own error says why')
    return result


def told(said: bool) -> bool:
    """What the first process says; all processes must ask."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(said))) if several() else said


def agreed(step: int) -> bool:
    """Whether one process was told to end, and this is the step after which all of them do."""
    return multihost_utils.reached_preemption_sync_point(step)


def put(array: Any, where: jax.sharding.Sharding) -> jax.Array:
    """An array on other devices, also on those of other processes, which hold the same values."""
    if where.is_fully_addressable:
        return jax.device_put(array, where)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=where)(array)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        bits = put(jax.random.key_data(array), where)
        return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(array))
    values = np.asarray(array)
    return jax.make_array_from_callback(values.shape, where, lambda index: values[index])


def whole(array: Any) -> np.ndarray:
    """The values of an array, those of other processes' parts too; all processes must ask."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def united(values: np.ndarray, missing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values of which each process has some, and those that none has; all processes must ask."""
    if not several():
        return values, missing
    raw = np.frombuffer(values.tobytes(), np.uint8).reshape(len(values), -1)
    every, gone = multihost_utils.process_allgather((raw, missing))
    owner = np.argmin(gone, axis=0)  # the first process that has it
    found = np.ascontiguousarray(every[owner, np.arange(len(values))])
    return found.view(values.dtype).reshape(values.shape), gone.all(axis=0)
