"""The arrays of phi on disk: written and read by Orbax, compared with what must be there.

Orbax casts in silence and knows neither empty arrays nor dictionaries whose joined keys collide;
hence arrays are stored flat by path, and shapes and dtypes are compared before anything is read.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import _disk, _paths, _pieces, _processes
from peftjax._manifest import CheckpointError
from peftjax._shapes import differences
from peftjax._types import Phi

Spec = tuple[tuple[int, ...], str]


def specs(phi: Any, where: str = 'phi') -> Any:
    """The tree of phi with `[shape, dtype]` for each array as `host` gives it, as JSON keeps it.

    Raises:
      TypeError: phi is not made of dicts with string keys, and arrays.
    """
    if isinstance(phi, Mapping):
        if not all(isinstance(key, str) for key in phi):
            raise TypeError(f'the keys of phi must be strings; {where} has {list(phi)!r:.80}')
        return {key: specs(one, f'{where}/{key}') for key, one in phi.items()}
    if isinstance(phi, jax.Array | np.ndarray | np.generic):
        return [list(phi.shape), str(native(phi.dtype))]
    raise TypeError(f'phi must be nested dicts of arrays; {where} is {phi!r:.80}')


def host(phi: Phi) -> dict[str, np.ndarray]:
    """The arrays of phi by path, in host memory; where parts lie elsewhere, all processes ask."""
    arrays = {path: _processes.whole(leaf) for path, leaf in _paths.leaves(phi).items()}
    return {path: a.astype(native(a.dtype), copy=False) for path, a in arrays.items()}


def native(dtype: np.dtype) -> np.dtype:
    """The same numbers in this machine's order of bytes: JAX has no arrays in another one."""
    return dtype.newbyteorder('=')


def check_finite(arrays: Mapping[str, np.ndarray], what: str) -> None:
    """Refuses NaN and Inf, with the paths.

    Raises:
      ValueError: an array holds a value that is not finite.
    """
    wrong = []
    for path, array in arrays.items():
        if jnp.issubdtype(array.dtype, jnp.inexact):
            count = int(np.sum(~np.isfinite(array)))
            wrong += [f'{path!r} ({count} of {array.size} values)'] if count else []
    if wrong:
        more = f' and {len(wrong) - 10} more' if len(wrong) > 10 else ''
        raise ValueError(
            f'{what} must be finite; NaN or Inf in {", ".join(wrong[:10])}{more}. '
            'Take the last good phi, or pass allow_nonfinite=True'
        )


def write(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Stores the arrays that have values; of several processes the first one alone does.

    Raises:
      OSError: they could not be written.
      ValueError: Orbax stores no such arrays.
    """
    import orbax.checkpoint as ocp

    filled = {path: array for path, array in arrays.items() if array.size}
    if not filled:
        return
    alone = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix='peftjax'
    )
    try:
        with ocp.Checkpointer(_handler(alone), multiprocessing_options=alone) as checkpointer:
            checkpointer.save(folder, ocp.args.PyTreeSave(_pieces.own(filled)))
    except ValueError as error:
        if (number := _disk.failure(error)) is not None:
            raise OSError(number, str(error), str(folder)) from error
        raise ValueError(f'phi must be what Orbax stores: {error}') from error


def read(folder: Path, tree: Any) -> Phi:
    """Restores phi as arrays on the default device.

    Args:
      folder: as for `write`.
      tree: as from `specs`.

    Raises:
      CheckpointError: arrays are missing, unexpected, of another shape or dtype, or unreadable.
      ValueError: JAX holds no such dtype as it is set up.
    """
    want = dict(_flat(tree, ()))
    filled = {'/'.join(keys): spec for keys, spec in want.items() if math.prod(spec[0])}
    arrays = _restore(folder, filled) if filled else {}
    phi: dict[str, Any] = _empty(tree)
    for keys, (shape, dtype) in want.items():
        array = jnp.asarray(arrays.get('/'.join(keys), np.zeros(shape, np.dtype(dtype))))
        if str(array.dtype) != dtype:
            raise ValueError(
                f'phi keeps its dtypes; {"/".join(keys)!r} in {str(folder)!r} is {dtype}, which '
                f"JAX would make {array.dtype}. Call jax.config.update('jax_enable_x64', True)"
            )
        home = phi
        for key in keys[:-1]:
            home = home[key]
        home[keys[-1]] = array
    return phi


def _flat(tree: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Spec]]:
    if isinstance(tree, dict):
        for key, one in tree.items():
            yield from _flat(one, (*keys, key))
    else:
        shape, dtype = tree
        yield keys, (tuple(shape), dtype)


def _empty(tree: Any) -> dict[str, Any]:
    return {key: _empty(one) for key, one in tree.items() if isinstance(one, dict)}


def _restore(folder: Path, want: Mapping[str, Spec]) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    as_stored = {
        path: ocp.RestoreArgs(restore_type=np.ndarray, dtype=np.dtype(dtype))
        for path, (_, dtype) in want.items()
    }
    try:
        with ocp.Checkpointer(_handler()) as checkpointer:
            stored = checkpointer.metadata(folder).item_metadata.tree
            have = {path: (tuple(m.shape), str(np.dtype(m.dtype))) for path, m in stored.items()}
            _compare(folder, want, have)
            item = dict.fromkeys(want, 0)
            return checkpointer.restore(
                folder, ocp.args.PyTreeRestore(item=item, restore_args=as_stored)
            )
    except CheckpointError:
        raise
    except Exception as error:  # A file that passed the manifest and still is not Orbax's.
        raise CheckpointError(
            f'{str(folder)!r} must hold arrays as Orbax stores them; reading it ended with '
            f'{type(error).__name__}: {error}. Take another copy, or save it again'
        ) from error


def _compare(folder: Path, want: Mapping[str, Spec], have: Mapping[str, Spec]) -> None:
    if wrong := differences(want, have):
        raise CheckpointError(
            f'{str(folder)!r} must hold the {len(want)} arrays of phi: {wrong}. Save it again'
        )


def _handler(processes: Any = None) -> Any:
    import orbax.checkpoint as ocp

    how = {} if processes is None else {'multiprocessing_options': processes}
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, **how)
