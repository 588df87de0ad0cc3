"""Reads a safetensors file of anyone's making: whole and sound, or refused by name.

The library that defines the format checks the header (size, offsets, overlaps, overflow). What it
lets pass is checked here: a name that stands twice, a header made to exhaust memory. Values are
read here too, since its reader for NumPy knows no bfloat16.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from peftjax._manifest import CheckpointError

LONGEST = 2**24
"""Bytes of a header; that of an adapter with 100,000 tensors has fewer."""

DTYPES = {
    'F64': np.float64,
    'F32': np.float32,
    'F16': np.float16,
    'BF16': jnp.bfloat16,
    'I64': np.int64,
    'I32': np.int32,
    'I16': np.int16,
    'I8': np.int8,
    'U8': np.uint8,
    'BOOL': np.bool_,
}


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file by name.

    Args:
      path: of the file.

    Returns:
      Arrays that lie in the file until they are touched.

    Raises:
      CheckpointError: the file is damaged, cut short, or no safetensors file.

    Example:
      >>> import tempfile
      >>> from safetensors.numpy import save_file
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_file({'a': np.ones(3, np.float32)}, f'{folder}/x.safetensors')
      ...     read(Path(folder, 'x.safetensors'))['a'].tolist()
      [1.0, 1.0, 1.0]
    """
    length = _checked(path)
    whole = np.memmap(path, np.uint8, 'r')
    try:
        header = json.loads(whole[8 : 8 + length].tobytes(), object_pairs_hook=_once)
        header.pop('__metadata__', None)
        return {name: _tensor(whole[8 + length :], entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _refusal(path, error) from error


def _checked(path: Path) -> int:
    """The length of a header that the library accepts."""
    import safetensors

    try:
        with path.open('rb') as file:
            length = int.from_bytes(file.read(8), 'little')
        if length > LONGEST:
            raise ValueError(f'a header of {length:,} bytes, more than {LONGEST:,}')
        with safetensors.safe_open(str(path), framework='numpy'):
            return length
    except (ValueError, safetensors.SafetensorError) as error:
        raise _refusal(path, error) from error


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose keys must differ."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f'{key!r:.80} stands twice in the header')
        found[key] = value
    return found


def _tensor(data: np.ndarray, entry: dict[str, Any]) -> np.ndarray:
    if entry['dtype'] not in DTYPES:
        raise ValueError(f'a tensor of dtype {entry["dtype"]!r:.40}; known are {[*DTYPES]}')
    start, end = entry['data_offsets']
    return data[start:end].view(DTYPES[entry['dtype']]).reshape(entry['shape'])


def _refusal(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f'{str(path)!r} ({path.stat().st_size:,} bytes) must be a whole safetensors file: {error}. '
        'Take another copy, or save it again'
    )
