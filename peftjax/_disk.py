"""What a disk does: it keeps bytes once it was told to, and fails."""

import errno
import os
import re
from pathlib import Path

REPORTED = re.compile(r"os_error_code='(\d+)'")
"""TensorStore's way to report a failure of the disk, at the end of a ValueError."""


def failure(error: BaseException) -> int | None:
    """The number of the system's error, where the disk failed; None where something else did."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    found = REPORTED.search(str(error))
    return int(found[1]) if found else None


def sync_all(folder: Path) -> None:
    """Brings files, then the folders that name them, to the disk."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path: Path, text: str) -> None:
    """Writes a file whole: whatever ends the machine, it is as it was, or has this text."""
    part = path.with_name(f'.{path.name}.part')
    part.write_text(text, encoding='utf-8')
    sync(part)
    part.replace(path)
    sync(path.parent)
