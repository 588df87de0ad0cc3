"""One writer for a folder; a lock goes with the process that holds it."""

import errno
import os
from pathlib import Path

FILE = 'lock'


class Lock:
    """Held from its making until `release`, or until the process ends in whatever way.

    A process that was forked from the holder has a handle too, and neither keeps the lock beyond
    its release nor releases it.

    Args:
      folder: what to hold; it is there.

    Raises:
      BlockingIOError: another process holds it, or this one does already.
      OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path):
        import fcntl  # Not on every system, and needed by writing alone.

        path = folder / FILE
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(self._handle, 100, 0).decode(errors='replace').strip()
            os.close(self._handle)
            raise BlockingIOError(
                errno.EAGAIN,
                f'a run folder has one writer; {owner or "another process"} is writing to it. '
                'Wait for it to end, or choose another folder',
                str(folder),
            ) from error
        self._owner = os.getpid()
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f'process {os.getpid()} of {os.uname().nodename}\n'.encode(), 0)

    def release(self) -> None:
        """Lets others write."""
        import fcntl

        if os.getpid() == self._owner:
            fcntl.flock(self._handle, fcntl.LOCK_UN)  # closing leaves it to a child's handle
        os.close(self._handle)
