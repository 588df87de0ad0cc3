"""Omniglot as few-shot papers use it, with alphabets held back.

The file is an npz of `images (characters, drawers, 28, 28)` uint8 with ink as 255 and nothing as 0,
`alphabet (characters,)` and `alphabet_names`. Papers invert the original images, on which ink is
black, and divide by 255; `pixels` has that of ours. Lake et al., 2015, doi:10.1126/science.aab3050.

MAML and prototypical networks train on 1,200 characters of all alphabets and are judged on the 423
others. Here whole alphabets are held back, so that no script is known: there are fewer characters
to train on, and those of a task look more alike.
"""

import hashlib
import os
import pathlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Rotated = Literal['train', 'all', 'none']
NEEDED = ('images', 'alphabet', 'alphabet_names')


class Part(NamedTuple):
    """Images of some alphabets.

    Attributes:
      images: `(rows, 28, 28)` uint8.
      labels: `(rows,)` int32, the character of each; a rotated one is another.
      alphabets: their names.
    """

    images: np.ndarray
    labels: np.ndarray
    alphabets: tuple[str, ...]


class Parts(NamedTuple):
    """Training, validation and test, which share no alphabet.

    Attributes:
      train: what is trained on.
      validation: what chooses.
      test: what is judged on.
    """

    train: Part
    validation: Part
    test: Part


def split(
    file: str | os.PathLike[str], *, seed: int, validation: int, test: int, rotated: Rotated
) -> Parts:
    """Alphabets held back by a seed; rotations by 90, 180 and 270 degrees as further characters.

    Published settings rotate the characters to train on; prototypical networks rotate all.

    Raises:
      ValueError: the file lacks an array, or has too few alphabets.
    """
    with np.load(file, allow_pickle=False) as found:
        if absent := [name for name in NEEDED if name not in found]:
            raise ValueError(f'{str(file)!r} must hold {NEEDED}: it lacks {absent}')
        images, alphabet, names = (found[name] for name in NEEDED)
    if min(validation, test) < 1 or validation + test >= len(names):
        raise ValueError(
            f'at least one of {len(names)} alphabets must be left to train on, and one for each of '
            f'validation and test: received validation={validation}, test={test}'
        )
    order = np.random.default_rng(seed).permutation(len(names))
    chosen = np.split(order, np.cumsum([test, validation]))
    turned = {'train': (0, 0, 1), 'all': (1, 1, 1), 'none': (0, 0, 0)}[rotated]
    own = [
        _part(images[np.isin(alphabet, which)], names[np.sort(which)], bool(turn))
        for which, turn in zip(chosen, turned, strict=True)
    ]
    return Parts(own[2], own[1], own[0])


def _part(images: np.ndarray, names: np.ndarray, turned: bool) -> Part:
    turns = [np.rot90(images, turn, (2, 3)) for turn in range(4 if turned else 1)]
    every = np.concatenate(turns)
    labels = np.repeat(np.arange(len(every), dtype=np.int32), every.shape[1])
    rows = np.ascontiguousarray(every.reshape(-1, *every.shape[2:]))
    return Part(rows, labels, tuple(map(str, names)))


def pixels(images: jax.Array, index: Any) -> jax.Array:
    """Images by position, `(..., 28, 28, 1)` float32 from 0 to 1, ink as 1."""
    return images[index][..., None].astype(jnp.float32) / jnp.float32(255)


def digest(file: str | os.PathLike[str]) -> str:
    """The sha256 of a file."""
    return hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()
