"""Folders that are whole or absent: written as a temporary sibling, then renamed into place.

To replace `x`, `x` becomes `.x.old`, `.x.saving` becomes `x`, and `.x.old` goes. Whenever that is
cut short, `x` or `.x.old` is whole: `current` reads the one that is there, and the next save
clears up.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from peftjax import _disk
from peftjax._manifest import MANIFEST


def current(target: Path) -> Path:
    """Where the folder lies: in place, or aside if a replacement was cut short.

    Raises:
      FileNotFoundError: in neither place.
      NotADirectoryError: there is a file.
    """
    old = _sibling(target, 'old')
    found = old if not os.path.lexists(target) and old.is_dir() else target
    if not found.exists():
        raise FileNotFoundError(errno.ENOENT, 'there is no saved folder', str(target))
    if not found.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, 'a saved folder is wanted, not a file', str(target))
    return found


@contextlib.contextmanager
def whole(target: Path, *, ours: frozenset[str], overwrite: bool, size: int) -> Iterator[Path]:
    """A fresh folder to write to: it becomes `target` at the end, or vanishes on an error.

    Args:
      target: the folder to make.
      ours: the names that such a folder may hold; one with others is never replaced.
      overwrite: whether to replace such a folder.
      size: about how many bytes will be written.

    Raises:
      FileExistsError: there is something at `target` that is not to be replaced.
      OSError: the folder cannot be written; what was there before stays as it was.
    """
    fresh = _sibling(target, 'saving')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _turn(target.parent):
            _recover(target)
            check_free(target, ours, overwrite)
            _check_space(target.parent, size)
            fresh.mkdir()
            try:
                yield fresh
                _disk.sync_all(fresh)
                _swap(fresh, target)
            finally:
                _remove(fresh)
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(
            error.errno,
            f'{str(target)!r} could not be saved ({size:,} bytes): {error.strerror or error} '
            f'({error.filename!r}). What was there before is as it was. '
            'Free space, or choose another place',
            error.filename,
        ) from error


@contextlib.contextmanager
def _turn(parent: Path) -> Iterator[None]:
    """Saves into one directory take turns; the lock goes with the process that holds it."""
    import fcntl  # Not on every system, and needed by saving alone.

    handle = os.open(parent, os.O_RDONLY)
    try:
        # Some network file systems know no locks; two writers of one name are not told apart there.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _recover(target: Path) -> None:
    """Clears up after a save that was cut short; its turn is over, so nobody writes there."""
    old = _sibling(target, 'old')
    if os.path.lexists(old):
        if os.path.lexists(target):
            _remove(old)
        else:
            os.rename(old, target)
    _remove(_sibling(target, 'saving'))


def check_free(target: Path, ours: frozenset[str], overwrite: bool) -> None:
    """Refuses a place where there is something that is not to be replaced.

    Args:
      target: the folder to make.
      ours: as of `whole`.
      overwrite: as of `whole`.

    Raises:
      FileExistsError: there is something.
    """
    if not os.path.lexists(target):
        return
    text = str(target)
    if not overwrite:
        raise FileExistsError(
            errno.EEXIST, 'there is something already; pass overwrite=True to replace it', text
        )
    if target.is_symlink() or not target.is_dir():
        raise FileExistsError(
            errno.EEXIST, 'only a folder is replaced, not a file or a link; choose another', text
        )
    names = {path.name for path in target.iterdir()}
    if names and (names - ours or MANIFEST not in names):
        raise FileExistsError(
            errno.EEXIST,
            f'only a saved adapter is replaced; this folder holds {sorted(names)[:5]}. '
            'Choose another, or remove it yourself',
            text,
        )


def _check_space(parent: Path, size: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < size:
        raise OSError(errno.ENOSPC, f'only {free:,} bytes are free', str(parent))


def _swap(fresh: Path, target: Path) -> None:
    old = _sibling(target, 'old')
    if os.path.lexists(target):
        os.rename(target, old)
    try:
        os.rename(fresh, target)
    except BaseException:
        if os.path.lexists(old):
            os.rename(old, target)
        raise
    _disk.sync(target.parent)
    _remove(old)


def _sibling(target: Path, what: str) -> Path:
    return target.parent / f'.{target.name}.{what}'


def _remove(path: Path) -> None:
    """Removes a leftover; what cannot be removed now is removed by the next save."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
