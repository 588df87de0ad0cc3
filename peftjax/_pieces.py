"""Large arrays are stored in pieces, so that storing takes little memory beside their own.

Orbax's OCDBT format, a few files for any number of arrays, holds all that it has encoded until its
end, which for large arrays is a second copy. Zarr's own files are written piece by piece.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from peftjax._types import Path

LARGE = 2**28
"""Bytes from which on arrays are stored so."""

PIECE = 2**23
"""Bytes of a piece, at most."""


class Own(np.ndarray):
    """An array that nobody writes to: Orbax, which copies what it is given, need not."""

    def __deepcopy__(self, memo: Any) -> 'Own':
        """Itself."""
        return self


def own(arrays: Mapping[Path, Any]) -> dict[Path, Any]:
    """The same arrays, those of the host not to be copied."""
    host = lambda array: array.view(Own) if isinstance(array, np.ndarray) else array
    return {path: host(array) for path, array in arrays.items()}


def wanted(arrays: Mapping[Path, Any]) -> bool:
    """Whether arrays are stored so: large ones of the host."""
    host = all(isinstance(array, np.ndarray) for array in arrays.values())
    return host and sum(array.nbytes for array in arrays.values()) >= LARGE


def handler() -> Any:
    """What stores them."""
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)


def save(arrays: Mapping[Path, Any]) -> Any:
    """What Orbax is asked to store."""
    import orbax.checkpoint as ocp

    pieces = {name: array for name, array in _numbered(own(arrays)).values()}
    args = {name: ocp.SaveArgs(chunk_byte_size=PIECE) for name in pieces}
    return ocp.args.PyTreeSave(pieces, save_args=args)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Orbax from warning, at each save, that there is nothing of OCDBT to bring together."""
    logger = logging.getLogger('absl')
    useful = lambda record: 'Skipping merge of OCDBT' not in record.getMessage()
    logger.addFilter(useful)
    try:
        yield
    finally:
        logger.removeFilter(useful)


def restore(targets: Mapping[Path, Any]) -> Any:
    """What Orbax is asked to read."""
    import orbax.checkpoint as ocp

    like = {name: target for name, target in _numbered(targets).values()}
    args = ocp.checkpoint_utils.construct_restore_args(like)
    return ocp.args.PyTreeRestore(item=like, restore_args=args)


def named(pieces: Mapping[str, Any], targets: Mapping[Path, Any]) -> dict[Path, Any]:
    """What was read, by path."""
    return {path: pieces[name] for path, (name, _) in _numbered(targets).items()}


def _numbered(arrays: Mapping[Path, Any]) -> dict[Path, tuple[str, Any]]:
    """Each with a name that a file may have, whatever its path is."""
    return {path: (str(i), arrays[path]) for i, path in enumerate(sorted(arrays))}
