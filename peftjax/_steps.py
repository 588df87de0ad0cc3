"""Numbered steps in a folder: stored by Orbax, sealed by our manifest, the oldest removed.

A step counts when it is sealed. Orbax's own mark says that all was written; whether it still is as
it was written, only the manifest can tell.
"""

import contextlib
import logging
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftjax import _disk, _manifest, _pieces, _processes
from peftjax._manifest import CheckpointError

STEP = re.compile(r'\d+(\.orbax-checkpoint-tmp.*)?')
"""The names of steps, and of those that Orbax is writing."""

OLD = re.compile(r'\.(\d+)\.old')
"""The names of steps that stand aside while another of the same number is written."""

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
      keep: how many of the newest stay, as `write` counts them.
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
        for path in list(self._folder.iterdir()):
            if STEP.fullmatch(path.name) and not _is_sealed(path):
                _log.warning(
                    'step %s in %s was never finished: it is removed', path.name, self._folder
                )
                shutil.rmtree(path)
            elif old := OLD.fullmatch(path.name):
                self._settle(int(old[1]))

    def sealed(self) -> list[int]:
        """The steps that count, oldest first."""
        return sorted(
            int(path.name)
            for path in self._folder.iterdir()
            if path.name.isdecimal() and _is_sealed(path)
        )

    def write(
        self,
        step: int,
        arrays: Mapping[str, Any],
        about: Mapping[str, Any],
        after: int | None = None,
        every: int = 1,
    ) -> None:
        """Stores a step and seals it; a step that is there already is replaced.

        Of several processes each stores its part, and the first one seals.

        Args:
          step: its number.
          arrays: by path.
          about: what is said of it, as JSON keeps it.
          after: the step that the run goes on from. Those after it are of a course that was left:
            they go before this one counts, or the next start would take the newest of them.
          every: of those that stay, multiples of it come first; the one that is written stays too.

        Raises:
          OSError: it could not be written; the others are as they were.
        """
        _processes.meet('before a step is written')  # all see the same steps below
        there, before = self._place(step).exists(), self.sealed()
        _processes.meet('what is there is known')
        left = [one for one in before if after is not None and one > after]
        if there:
            _processes.led('set a step aside', lambda: self._set_aside(step))
            self._manager.reload()
        try:
            self._store(step, arrays, about)
            _processes.led('seal it', lambda: self._seal(step, left))
        except BaseException:
            self._clear(step)
            self._put_back(step)
            raise
        _processes.led('remove what it replaces', lambda: self._settle(step))
        for one in left:
            _log.warning('step %d is of a course that was left at step %d: removed', one, after)
        known = {*before, step}.difference(left) | {step}
        best = sorted(known, key=lambda one: (one % every == 0, one))[-self._keep :]
        for one in sorted({*before}.difference(best) - {step}):
            self._remove(one)

    def _store(self, step: int, arrays: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        items: dict[str, Any] = {'about': self._args.JsonSave(dict(about))}
        if _pieces.wanted(arrays):
            items[PIECES] = _pieces.save(arrays)
        else:
            items['arrays'] = self._args.StandardSave(_pieces.own(arrays))
        with _pieces.quiet():
            self._manager.save(step, args=self._args.Composite(**items), force=True)

    def _seal(self, step: int, left: list[int]) -> None:
        """Makes a step count, and those of a course that was left no more.

        Its files come to the disk first: where the power fails, a seal must not outlive them.
        """
        _disk.sync_all(self._place(step))
        _disk.sync(self._folder)
        for one in left:
            place = self._aside(one) if one == step else self._place(one)
            (place / _manifest.MANIFEST).unlink(missing_ok=True)
        _manifest.seal(self._place(step), self._writer)

    def about(self, step: int) -> dict[str, Any]:
        """What was said of a step, after its files were checked.

        Raises:
          CheckpointError: a file was changed, cut, deleted or added.
        """
        _manifest.verify(self._place(step))
        return self._restore(step, about=self._args.JsonRestore())['about']

    def arrays(self, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays of a step whose files were checked, each with the sharding of its target."""
        if not (self._place(step) / PIECES).is_dir():
            return self._restore(step, arrays=self._args.StandardRestore(dict(targets)))['arrays']
        pieces = self._restore(step, **{PIECES: _pieces.restore(targets)})[PIECES]
        return _pieces.named(pieces, targets)

    def _place(self, step: int) -> Path:
        return self._folder / str(step)

    def _aside(self, step: int) -> Path:
        return self._folder / f'.{step}.old'

    def _set_aside(self, step: int) -> None:
        shutil.rmtree(self._aside(step), ignore_errors=True)
        self._place(step).rename(self._aside(step))

    def _settle(self, step: int) -> None:
        """What stands aside goes where another is sealed in its place, and returns elsewhere."""
        place, aside = self._place(step), self._aside(step)
        if _is_sealed(aside) and not _is_sealed(place):
            shutil.rmtree(place, ignore_errors=True)
            aside.rename(place)
        shutil.rmtree(aside, ignore_errors=True)

    def _put_back(self, step: int) -> None:
        """After a step could not be written; what fails here is done by the next start."""
        with contextlib.suppress(OSError):
            if _processes.first():
                self._settle(step)
            self._manager.reload()

    def _remove(self, step: int) -> None:
        """Breaks the seal first: what is half removed must not count."""
        seal = self._place(step) / _manifest.MANIFEST
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
                f'{str(self._place(step))!r} must hold a step as Orbax stores it; reading '
                f'it ended with {type(error).__name__}: {error}'
            ) from error

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._manager.close()


def _is_sealed(place: Path) -> bool:
    return (place / _manifest.MANIFEST).is_file()
