"""Names of saved adapters: plain enough for every file system, and never a way out of a folder."""

import os
import re
from pathlib import Path

LONGEST = 100
DEVICES = re.compile(r'(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?', re.IGNORECASE)


def check_name(name: str) -> str:
    """A name that can stand for one folder, unchanged.

    Args:
      name: ASCII letters, digits, `.`, `_` and `-`; the first a letter, digit or `_`, the last
        not `.`; at most 100; not the name of a Windows device.

    Raises:
      TypeError: it is not a string.
      ValueError: it breaks one of the rules.

    Example:
      >>> check_name('intents-r8')
      'intents-r8'
    """
    if not isinstance(name, str):
        raise TypeError(f'the name of an adapter must be a string; got {name!r}')
    plain = re.fullmatch(r'[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_-])?', name)
    if not plain or len(name) > LONGEST or DEVICES.fullmatch(name):
        raise ValueError(
            'the name of an adapter must be ASCII letters, digits, ".", "_" or "-", begin with a '
            f'letter, digit or "_", not end with ".", have at most {LONGEST} characters and not '
            f'be a Windows device; got {name!r:.140}. Choose such a name'
        )
    return name


def local(directory: str | os.PathLike[str]) -> Path:
    """A path of this machine, in full.

    Raises:
      TypeError: it is no path.
      ValueError: it is an address elsewhere, or holds NUL.
    """
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(f'the place of a saved adapter must be a str or a path; got {directory!r}')
    text = str(os.fspath(directory))
    if '\0' in text or '://' in text:
        raise ValueError(f'the place of a saved adapter must be a local path; got {text!r:.140}')
    return Path(os.path.abspath(text))


def place(directory: str | os.PathLike[str], name: str | None) -> Path:
    """The folder to make: a directory, or a name in it.

    Raises:
      TypeError: the directory is no path.
      ValueError: the directory does not say a name for the folder, or the name is refused.
    """
    if name is not None:
        return local(directory) / check_name(name)
    path, last = local(directory), os.path.basename(os.path.normpath(directory))
    if not os.fspath(directory) or last in ('', '.', '..') or not path.name:
        raise ValueError(
            f'a place to save must end with the name of a folder; got {str(directory)!r}. '
            'Add a name: save(directory, peft, phi, name="my-adapter")'
        )
    return path
