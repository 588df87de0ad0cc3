"""What a run is made of, written once beside its steps and compared at each start."""

import errno
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftjax import _disk, _manifest, _position, _serialize
from peftjax._fingerprint import Fingerprint
from peftjax._lock import Lock
from peftjax._manifest import CheckpointError
from peftjax._peft import Peft
from peftjax._types import PyTree
from peftjax._version import __version__

FILE = 'run.json'
STEPS = 'steps'


def names(other: Any) -> tuple[str, ...]:
    """Names of settings: of a string, each letter would be one, and each part of it."""
    if not isinstance(other, tuple | list) or not all(isinstance(name, str) for name in other):
        raise TypeError(
            f'other_settings must be a tuple of names: received {other!r:.200}. Give '
            "('data_seed',), say"
        )
    return tuple(other)


def own(peft: Peft, params: PyTree, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the run is made of, as JSON keeps it."""
    return {
        'method': str(peft.method),
        'peft': _serialize.encode(peft),
        'fingerprint': _serialize.encode(Fingerprint.of(params)),
        'settings': _position.kept('settings', dict(settings)),
    }


def take(folder: Path, own: Mapping[str, Any], other: tuple[str, ...]) -> Lock:
    """Makes a folder this run's and this process's."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder)
    try:
        _claim(folder / FILE, own, other)
    except BaseException:
        lock.release()
        raise
    return lock


def _claim(path: Path, own: Mapping[str, Any], other: tuple[str, ...]) -> None:
    """Writes what the run is made of, after it was compared with what an earlier start wrote."""
    found = _read(path, own) if path.exists() else None
    known = {**own['settings'], **(found['settings'] if found else {})}
    if unknown := [name for name in other if name not in known]:
        raise ValueError(
            f'other_settings must name settings: received {unknown[0]!r}. There are {sorted(known)}'
        )
    if found is not None:
        if wrong := _differing(found, own, other):
            raise ValueError(
                f'{str(path.parent)!r} is the folder of another run: {"; ".join(wrong)}. Go on '
                'with what the run was started with, or choose another folder'
            )
    elif (path.parent / STEPS).exists():
        raise FileExistsError(
            errno.EEXIST,
            f'a new run needs a folder without {STEPS!r}: what is there is of something else. '
            'Choose another folder',
            str(path.parent),
        )
    body = {'format': _manifest.FORMAT, 'writer': f'peftjax {__version__}', **own}
    _disk.write(path, json.dumps(body, indent=1) + '\n')


def _read(path: Path, own: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier start wrote.

    Raises:
      CheckpointError: it is damaged.
    """
    found = _manifest.parse(path)
    try:
        kinds = {name: type(value) for name, value in own.items()}
        if all(isinstance(found[name], kind) for name, kind in kinds.items()):
            _decoded(found['fingerprint'])
            return found
        reason = 'of another kind than it was written'
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f'{type(error).__name__}: {error}'
    raise CheckpointError(
        f'{str(path)!r} must say what the run is made of; it is damaged ({reason}). Take another '
        'copy, or start anew in another folder'
    )


def _decoded(fingerprint: Any) -> Fingerprint:
    return _serialize.decode(fingerprint, {'Fingerprint': Fingerprint})


def _differing(
    found: Mapping[str, Any], own: Mapping[str, Any], other: tuple[str, ...]
) -> list[str]:
    """What differs, for people."""
    changed = lambda name, a, b: f'{name} was {a!s:.300} and is {b!s:.300} now'
    wrong = []
    if found['method'] != own['method']:
        wrong.append(changed('the method', found['method'], own['method']))
    elif not _agree(found['peft'], own['peft']):
        wrong.append('the sites that the method is attached to are others')
    elif found['fingerprint'] != own['fingerprint']:
        paths = _decoded(found['fingerprint']).apart(_decoded(own['fingerprint']))
        if paths:
            wrong.append(f'theta holds other values at {len(paths)} paths, such as {paths[0]!r}')
    before, now = found['settings'], own['settings']
    wrong += [
        changed(name, repr(before.get(name)), repr(now.get(name)))
        for name in {**before, **now}
        if name not in other and not _same(before.get(name), now.get(name))
    ]
    return wrong


def _agree(found: Any, own: Any) -> bool:
    """Whether a plan is the one that was written: a field that was unknown then says nothing."""
    if isinstance(found, list) and isinstance(own, list):
        return len(found) == len(own) and all(map(_agree, found, own))
    if not isinstance(found, dict) or not isinstance(own, dict) or found.keys() != own.keys():
        return found == own
    return all(_fields_agree(found[name], own[name]) for name in own)  # of a class, by its name


def _fields_agree(found: Any, own: Any) -> bool:
    if not isinstance(found, dict) or not isinstance(own, dict):
        return found == own
    there = found.keys() <= own.keys()
    return there and all(_agree(value, own[name]) for name, value in found.items())


def _same(one: Any, two: Any) -> bool:
    """Whether two settings are the same: NaN, which equals nothing, is as it is written."""
    text = functools.partial(json.dumps, sort_keys=True)
    return one == two or text(one) == text(two)
