"""Reads the tensors of a Hugging Face folder one at a time: safetensors, single or sharded."""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

_SINGLE, _INDEX = 'model.safetensors', 'model.safetensors.index.json'
_FLOATS = {'BF16': jnp.bfloat16, 'F16': np.float16, 'F32': np.float32, 'F64': np.float64}
_PICKLED = ('pytorch_model*.bin', '*.bin', '*.pt', '*.pth', '*.ckpt')


class Checkpoint(Mapping[str, np.ndarray]):
    """Tensors of a folder by their stored names; each is read when it is asked for.

    A tensor comes from the file that the index names for it, whatever other files hold.

    Args:
      folder: holds `model.safetensors`, or `model.safetensors.index.json` and its shards.

    Raises:
      FileNotFoundError: no safetensors in the folder (the message says what to do about `.bin`
        and `.pt` files), or a shard that the index names is absent.
      ValueError: a truncated or malformed file, by name; or a tensor that several files hold and
        the index does not name.

    Example:
      >>> checkpoint = Checkpoint(folder)  # doctest: +SKIP
      >>> checkpoint['embeddings.LayerNorm.weight'].shape  # doctest: +SKIP
      (384,)
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._readers: dict[str, Any] = {}
        files = _files(folder)
        listed = {name for expected in files.values() for name in expected}
        for file, expected in files.items():
            reader = _open(folder / file)
            held = set(reader.keys())
            absent = sorted(set(expected) - held)
            if absent:
                raise ValueError(
                    f'{folder / file} must hold the tensors that {_INDEX} lists for it; absent: '
                    f'{absent[:5]} ({len(absent)} in all). Download the folder again.'
                )
            beyond = held - listed
            if twice := sorted(beyond & set(self._readers)):
                raise ValueError(
                    f'{_INDEX} must say which file a tensor is in where several hold it; it does '
                    f'not name {twice[:5]}, of {folder / file} and another. Download the folder '
                    'again.'
                )
            self._readers |= dict.fromkeys([*expected, *sorted(beyond)], reader)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._readers[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A rectangle of a tensor; the rest of it is not read.

        Args:
          name: stored name.
          index: of step one, for each axis.

        Returns:
          The part.
        """
        return self._readers[name].get_slice(name)[index] if index else self[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, read from the file's header alone.

        Args:
          name: stored name.

        Returns:
          The shape.
        """
        return tuple(self._readers[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor, read from the file's header alone.

        Args:
          name: stored name.

        Returns:
          The dtype.

        Raises:
          ValueError: its numbers are no floats, and mean something else than their values.
        """
        stored = self._readers[name].get_slice(name).get_dtype()
        if stored not in _FLOATS:
            raise ValueError(
                f'{name!r} must be stored as one of {sorted(_FLOATS)}, in {self.folder} it is '
                f'{stored}: codes of a quantizer that is not read here. Take the checkpoint that '
                'it was made of.'
            )
        return np.dtype(_FLOATS[stored])


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      path: of the file.

    Returns:
      Its content.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f'a Hugging Face model folder must hold {path.name}; {path.parent} does not.'
        )
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f'{path} must be JSON: {error}. Download the file again.') from error
    if not isinstance(content, dict):
        raise ValueError(f'{path} must hold a JSON object, got {type(content).__name__}.')
    return content


def _files(folder: pathlib.Path) -> dict[str, list[str]]:
    """File name -> the tensors that the index lists for it (none, where there is no index)."""
    if (folder / _SINGLE).is_file():
        return {_SINGLE: []}
    if (folder / _INDEX).is_file():
        shards: dict[str, list[str]] = {}
        weight_map = read_json(folder / _INDEX).get('weight_map')
        if not isinstance(weight_map, dict):
            raise ValueError(f"{folder / _INDEX} must hold an object 'weight_map'.")
        for name, file in weight_map.items():
            if pathlib.Path(file).name != file:
                raise ValueError(
                    f'{folder / _INDEX} names the shard {file!r}: shards must lie beside it.'
                )
            shards.setdefault(file, []).append(name)
        return shards
    pickled = sorted({path.name for pattern in _PICKLED for path in folder.glob(pattern)})
    if pickled:
        raise FileNotFoundError(
            f'{folder} must hold {_SINGLE} or {_INDEX}; it holds {pickled}, which are pickles and '
            'are not read: unpickling runs code. Convert to safetensors (in PyTorch: '
            'model.save_pretrained(folder, safe_serialization=True)).'
        )
    raise FileNotFoundError(f'{folder} must hold {_SINGLE} or {_INDEX}; it holds neither.')


def _open(path: pathlib.Path) -> Any:
    import safetensors

    if not path.is_file():
        raise FileNotFoundError(f'{_INDEX} names the shard {path}, which does not exist.')
    try:
        return safetensors.safe_open(str(path), framework='numpy')
    except safetensors.SafetensorError as error:
        raise ValueError(
            f'{path} must be a whole safetensors file: {error} ({path.stat().st_size} bytes). '
            'Download the file again.'
        ) from error
