"""Saving and loading a `Peft` and its phi: a folder that any JAX code can read without the model.

adapter.json    format, writer, metadata, the method and its sites, the base's fingerprint
phi/            the arrays, as Orbax stores them, flat by path
manifest.json   the sha256 of every file
"""

import dataclasses
import inspect
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from peftjax import _arrays, _folder, _manifest, _names, _processes, _serialize
from peftjax import methods as _methods
from peftjax._chain import Chain
from peftjax._fingerprint import Fingerprint
from peftjax._manifest import CheckpointError as CheckpointError
from peftjax._method import Method
from peftjax._peft import Peft
from peftjax._sites import Site
from peftjax._types import Phi, PyTree
from peftjax._version import __version__

ADAPTER = 'adapter.json'
ARRAYS = 'phi'
OURS = frozenset({ADAPTER, ARRAYS, _manifest.MANIFEST})


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """What `load` found: no model is needed to read it.

    Attributes:
      peft: equal to the one that was saved.
      phi: its arrays, bit for bit, each of its own dtype.
      fingerprint: what is known of the base parameters; `None` if they were not given to `save`.
      metadata: as given to `save`.
    """

    peft: Peft
    phi: Phi
    fingerprint: Fingerprint | None
    metadata: dict[str, Any]

    def check(self, params: PyTree, *, allow_other_base: bool = False) -> None:
        """Refuses parameters that this phi was not trained on.

        Args:
          params: the base parameters.
          allow_other_base: take other values of the same shapes.

        Raises:
          ValueError: paths or shapes differ, or the values do.

        Warns:
          UserWarning: the values cannot be compared, since `save` was not given any.
        """
        self.peft._check_params(params)
        if allow_other_base:
            return
        if self.fingerprint is None:
            warnings.warn(
                'the base is unverified: only paths and shapes could be compared. Give params to '
                'save, or pass allow_other_base=True',
                stacklevel=2,
            )
            return
        wrong = self.fingerprint.differing(params)
        if wrong:
            more = f' and {len(wrong) - 10} more' if len(wrong) > 10 else ''
            raise ValueError(
                'the base must be the one that phi was trained on: '
                f'{len(wrong)} of {len(self.fingerprint.leaves)} leaves hold other values: '
                f'{", ".join(map(repr, wrong[:10]))}{more}. '
                'Load that base, or pass allow_other_base=True'
            )


def save(
    directory: str | os.PathLike[str],
    peft: Peft,
    phi: Phi,
    *,
    params: PyTree | None = None,
    name: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
) -> Path:
    """Saves a `Peft` and its phi as one folder, whole or not at all.

    The base parameters are not saved: a few of their values are, so that `load` can tell another
    base from this one. Of several processes all call it, and the first one writes.

    Args:
      directory: the folder to make, or with `name` the one to make it in.
      peft: as from `attach`.
      phi: as from `peft.init`; dtypes may differ from those at init and are kept.
      params: the base parameters, for the fingerprint; without them `load` cannot tell other
        weights of the same shapes.
      name: a plain name for the folder, such as one that a user typed: never leads out of
        `directory`.
      metadata: anything that JSON keeps, such as names of labels.
      overwrite: whether to replace an adapter that is there already.
      allow_nonfinite: whether NaN and Inf may be saved.

    Returns:
      The folder, as an absolute path.

    Raises:
      ValueError: `name`, `phi`, `params` or `metadata` is refused; nothing was written.
      TypeError: a value that cannot be saved.
      FileExistsError: there is something already, or what is there is not a saved adapter.
      OSError: the disk is full or read-only; what was there before is as it was.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj, tempfile
      >>> from peftjax import checkpoint
      >>> params = {'up': {'kernel': jnp.ones((3, 4))}}
      >>> peft = pj.attach(
      ...     pj.Lora(rank=2, target='kernel'),
      ...     lambda p, x: x @ p['up']['kernel'], params, jnp.ones((5, 3)))
      >>> phi = peft.init(jax.random.key(0), params)
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     folder = checkpoint.save(directory, peft, phi, params=params, name='tiny')
      ...     loaded = checkpoint.load(folder, params=params)
      >>> loaded.peft == peft
      True
    """
    target = _names.place(directory, name)
    if not isinstance(peft, Peft):
        raise TypeError(f'save takes a Peft, as from attach; got {peft!r:.80}')
    tree = _arrays.specs(phi)
    peft._check_phi(phi)
    _check_methods(peft)
    arrays = _arrays.host(phi)
    if not allow_nonfinite:
        _arrays.check_finite(arrays, 'phi')
    writer = f'peftjax {__version__}'
    text = _document(
        {
            'format': _manifest.FORMAT,
            'writer': writer,
            'metadata': _plain(metadata or {}),
            'arrays': tree,
            'peft': _serialize.encode(peft),
            'fingerprint': None if params is None else _fingerprint(peft, params),
        }
    )
    size = len(text) + sum(array.nbytes for array in arrays.values())

    def write() -> None:
        with _folder.whole(target, ours=OURS, overwrite=overwrite, size=size) as folder:
            (folder / ADAPTER).write_text(text, encoding='utf-8')
            _arrays.write(folder / ARRAYS, arrays)
            _manifest.seal(folder, writer)

    _processes.led(f'save {str(target)!r}', write)
    return target


def load(
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    params: PyTree | None = None,
    allow_other_base: bool = False,
    allow_nonfinite: bool = False,
    methods: Sequence[type[Method]] = (),
) -> Loaded:
    """Loads what `save` wrote; every file is checked before it is read.

    Nothing is unpickled and no code is taken from the folder.

    Args:
      directory: the folder, or with `name` the one that it is in.
      name: as given to `save`.
      params: the base parameters, to be checked as by `Loaded.check`; where they lie on a mesh, phi
        is put there too, as `Peft.shardings` says.
      allow_other_base: take other values of the same shapes.
      allow_nonfinite: take NaN and Inf.
      methods: classes of your own that may occur, besides those of `peftjax.methods`.

    Returns:
      The `Peft`, phi, the fingerprint of the base, and the metadata.

    Raises:
      FileNotFoundError: there is no such folder.
      CheckpointError: a file is damaged, missing or unknown, or of another version.
      ValueError: phi is not finite, or `params` is another base.
    """
    target = _names.local(directory) if name is None else _names.place(directory, name)
    if name is not None and target.is_symlink():
        raise CheckpointError(f'a name must stand for a folder; {str(target)!r} is a link')
    folder = _folder.current(target).resolve()
    file = folder / ADAPTER
    if file.is_file() and not file.is_symlink():
        _manifest.parse(file)  # Another version is the better news, whatever else has changed.
    _manifest.verify(folder)
    if not file.is_file():
        raise CheckpointError(f'a saved folder must hold {str(file)!r}, which is missing')
    found = _manifest.parse(file)
    try:
        peft = _typed(_serialize.decode(found['peft'], _known(methods)), Peft)
        seen = _serialize.decode(found['fingerprint'], {'Fingerprint': Fingerprint})
        fingerprint = None if seen is None else _typed(seen, Fingerprint)
        phi = _arrays.read(folder / ARRAYS, found['arrays'])
        peft._check_phi(phi)
        metadata = _typed(found['metadata'], dict)
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f'{str(file)!r} must describe an adapter; {type(error).__name__}: {error}'
        ) from error
    if not allow_nonfinite:
        _arrays.check_finite(_arrays.host(phi), f'phi in {str(folder / ARRAYS)!r}')
    loaded = Loaded(peft, phi, fingerprint, metadata)
    if params is None:
        return loaded
    loaded.check(params, allow_other_base=allow_other_base)
    where = peft.shardings(params)
    if where is None:
        return loaded
    return dataclasses.replace(loaded, phi=jax.tree.map(_processes.put, phi, where))


def _known(methods: Sequence[type[Method]]) -> dict[str, type]:
    """The classes that a file may name."""
    known: dict[str, type] = {'Peft': Peft, 'Chain': Chain, 'Site': Site}
    for found in vars(_methods).values():
        concrete = isinstance(found, type) and not inspect.isabstract(found)
        if concrete and issubclass(found, Method):
            known[found.__name__] = found
    for cls in methods:
        if known.get(cls.__name__, cls) is not cls:
            raise ValueError(f'methods must have names of their own; {cls.__name__} is ours')
        known[cls.__name__] = cls
    return known


def _check_methods(peft: Peft) -> None:
    """A method of the user's own needs a name that is not ours."""
    _known([type(part) for _, part in peft.method.parts])


def _fingerprint(peft: Peft, params: PyTree) -> Any:
    peft._check_params(params)
    return _serialize.encode(Fingerprint.of(params))


def _typed(value: Any, cls: type) -> Any:
    if not isinstance(value, cls):
        raise TypeError(f'{cls.__name__} is wanted; got {value!r:.80}')
    return value


def _plain(metadata: Mapping[str, Any]) -> Any:
    """The metadata, if JSON gives back the same."""
    try:
        same = json.loads(json.dumps(metadata, allow_nan=False)) == metadata
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f'metadata must be what JSON keeps: {error}') from error
    if not same or not isinstance(metadata, dict):
        raise ValueError(
            'metadata must be what JSON keeps, a dict with strings as keys and lists, not tuples; '
            f'got {metadata!r:.200}'
        )
    return metadata


def _document(fields: Mapping[str, Any]) -> str:
    """JSON with one line for each entry: easy to look at, and small."""
    lines = (f'{json.dumps(key)}: {json.dumps(value)}' for key, value in fields.items())
    return '{\n' + ',\n'.join(lines) + '\n}\n'
