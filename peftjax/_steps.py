"""Numbered steps in a folder: stored by Orbax, sealed by our manifest, the oldest removed.

A step counts when it is sealed. Orbax's own mark says that all was written; whether it still is as
it was written, only the manifest can tell.
"""

import logging
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftjax import _manifest, _pieces, _processes
from peftjax._manifest import CheckpointError

STEP = re.compile(r'\d+(\.orbax-checkpoint-tmp.*)?')
"""The names of steps, and of those that Orbax is writing."""

PIECES = 'pieces'
"""The item that holds the arrays where they are large."""

PATIENCE = 2.0
"""Seconds in which the writes of a step that failed may still arrive: TensorStore goes on with
those that it has begun, and each makes its folders anew."""

_log = logging.getLogger('peftjax')


class Steps:
    """The steps in one folder.

    Args:
      folder: made if absent; steps that were never sealed are removed from it, nothing else.
      keep: how many of the newest stay.
      writer: the program and version, for error messages.
    """

    def __init__(self, folder: Path, keep: int, writer: str):
        import orbax.checkpoint as ocp

        self._folder, self._keep, self._writer = folder, keep, writer
        _processes.led('clear up the run folder', self._clear_up)
        self._args = ocp.args
        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False, create=False),
            item_handlers={
                'arrays': ocp.StandardCheckpointHandler(),
                PIECES: _pieces.handler(),
                'about': ocp.JsonCheckpointHandler(),
            },
        )

    def _clear_up(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
            if STEP.fullmatch(path.name) and not (path / _manifest.MANIFEST).is_file():
                _log.warning(
                    'step %s in %s was never finished: it is removed', path.name, self._folder
                )
                shutil.rmtree(path)

    def sealed(self) -> list[int]:
        """The steps that count, oldest first."""
        return sorted(
            int(path.name)
            for path in self._folder.iterdir()
            if path.name.isdecimal() and (path / _manifest.MANIFEST).is_file()
        )

    def write(self, step: int, arrays: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Stores a step and seals it; a step that is there already is replaced.

        Of several processes each stores its part, and the first one seals.

        Raises:
          OSError: it could not be written; the others are as they were.
        """
        _processes.meet('before a step is written')  # all see the same steps below
        there, before = (self._folder / str(step)).exists(), self.sealed()
        _processes.meet('what is there is known')
        if there:
            self._remove(step)
        items: dict[str, Any] = {'about': self._args.JsonSave(dict(about))}
        if _pieces.wanted(arrays):
            items[PIECES] = _pieces.save(arrays)
        else:
            items['arrays'] = self._args.StandardSave(_pieces.own(arrays))
        try:
            with _pieces.quiet():
                self._manager.save(step, args=self._args.Composite(**items), force=True)
            seal = lambda: _manifest.seal(self._folder / str(step), self._writer)
            _processes.led('seal it', seal)
        except BaseException:
            self._clear(step)
            raise
        for old in sorted({*before, step})[: -self._keep]:
            self._remove(old)

    def about(self, step: int) -> dict[str, Any]:
        """What was said of a step, after its files were checked.

        Raises:
          CheckpointError: a file was changed, cut, deleted or added.
        """
        _manifest.verify(self._folder / str(step))
        return self._restore(step, about=self._args.JsonRestore())['about']

    def arrays(self, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays of a step whose files were checked, each with the sharding of its target."""
        if not (self._folder / str(step) / PIECES).is_dir():
            return self._restore(step, arrays=self._args.StandardRestore(dict(targets)))['arrays']
        pieces = self._restore(step, **{PIECES: _pieces.restore(targets)})[PIECES]
        return _pieces.named(pieces, targets)

    def _remove(self, step: int) -> None:
        """Breaks the seal first: what is half removed must not count."""
        seal = self._folder / str(step) / _manifest.MANIFEST
        _processes.led('break a seal', lambda: seal.unlink(missing_ok=True))
        self._manager.delete(step)

    def _clear(self, step: int) -> None:
        """Removes what a step that could not be written has left; the next start tries again."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            for path in self._left(step):
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(PATIENCE / 10)
            if not self._left(step):
                return

    def _left(self, step: int) -> list[Path]:
        named = (path for path in self._folder.glob(f'{step}*') if STEP.fullmatch(path.name))
        return [path for path in named if path.name.split('.')[0] == str(step)]

    def _restore(self, step: int, **args: Any) -> Any:
        try:
            return self._manager.restore(step, args=self._args.Composite(**args))
        except Exception as error:  # A file that passed the manifest and still is not Orbax's.
            raise CheckpointError(
                f'{str(self._folder / str(step))!r} must hold a step as Orbax stores it; reading '
                f'it ended with {type(error).__name__}: {error}'
            ) from error

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._manager.close()
