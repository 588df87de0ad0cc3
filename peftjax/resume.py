"""Checkpoints of a run: a training that was cut off goes on as if it had not been.

run.json        what the run is made of: the method and its sites, the base's fingerprint, settings
lock            held by the process that writes
steps/<n>/      the state after n batches, as Orbax stores it, and the sha256 of every file
"""

import concurrent.futures
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peftjax import _disk, _position, _processes, _run_file, _state
from peftjax._counts import whole
from peftjax._lock import FILE as LOCK  # noqa: F401
from peftjax._lock import Lock
from peftjax._manifest import CheckpointError
from peftjax._peft import Peft
from peftjax._run_file import FILE as FILE
from peftjax._run_file import STEPS
from peftjax._shapes import differences
from peftjax._steps import Steps
from peftjax._types import PyTree
from peftjax._version import __version__
from peftjax.train import TrainState

_log = logging.getLogger('peftjax')


class Restored(NamedTuple):
    """Where a run stood.

    Attributes:
      state: bit for bit as it was saved; arrays of NumPy as a step takes them, in the dtype that
        JAX has for theirs.
      data: as given to `save`, such as the state of an iterator.
      step: the number of batches seen.
    """

    state: TrainState
    data: Any
    step: int


class Checkpoints:
    """The states of one run in a folder, written in the background, whole or not at all.

    What a run is made of is written once: the method and its sites, a fingerprint of theta, and
    settings of your own, such as seed and data. A folder of another run is refused, and what
    differs is named. Theta itself is never written. A context manager; `close` waits for what is
    being written.

    Args:
      directory: the folder of the run, made if absent.
      peft: as from `attach`.
      params: theta, for its fingerprint.
      settings: whatever else must be the same when the run goes on, as JSON keeps it.
      keep: how many of the newest steps stay on disk, as `save` counts them.
      other_settings: names of settings, each in a tuple, that may differ from those of an earlier
        start.

    Raises:
      BlockingIOError: another process writes to the folder.
      CheckpointError: run.json is damaged, or of another version.
      FileExistsError: the folder holds steps of something else.
      ValueError: the folder is of another run, `keep` is not positive, or a name in
        `other_settings` is of no setting.
      TypeError: `keep` is no integer, `other_settings` no tuple of names, or JSON does not keep the
        settings.

    Example:
      >>> import jax, jax.numpy as jnp, optax, peftjax as pj, tempfile
      >>> params, x = {'kernel': jnp.ones((3, 4))}, jnp.ones((2, 3))
      >>> model = lambda params, x: x @ params['kernel']
      >>> peft = pj.attach(pj.Lora(rank=2, target='kernel'), model, params, x)
      >>> forward, tx = peft.wrap(model), optax.sgd(0.1)
      >>> step = pj.train_step(lambda p, phi, x, key: (forward(p, phi, x) ** 2).mean(), tx)
      >>> fresh = lambda: pj.start(tx, peft.init(jax.random.key(0), params), jax.random.key(1))
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     state = fresh()
      ...     with pj.Checkpoints(directory, peft, params, settings={'seed': 0}) as checkpoints:
      ...         for _ in range(3):
      ...             state, _ = step(params, state, x)
      ...         checkpoints.save(state, data={'batches': 3})
      ...     with pj.Checkpoints(directory, peft, params, settings={'seed': 0}) as checkpoints:
      ...         restored = checkpoints.restore(fresh())
      >>> restored.step, restored.data
      (3, {'batches': 3})
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        peft: Peft,
        params: PyTree,
        *,
        settings: Mapping[str, Any] | None = None,
        keep: int = 2,
        other_settings: tuple[str, ...] = (),
    ):
        keep, other_settings = whole('keep', keep), _run_file.names(other_settings)
        self._folder = Path(directory).absolute()
        own = _run_file.own(peft, params, settings or {})
        self._lock: Lock | None = _processes.led(
            'take the run folder', lambda: _run_file.take(self._folder, own, other_settings)
        )
        try:
            self._steps = Steps(self._folder / STEPS, keep, f'peftjax {__version__}')
        except BaseException:
            self._release()
            raise
        self._thread = concurrent.futures.ThreadPoolExecutor(1, 'checkpoints')
        self._writing: concurrent.futures.Future[None] | None = None
        self._at: int | None = None  # the step that the run goes on from
        self._counts: Mapping[str, Any] = {}

    def __enter__(self) -> 'Checkpoints':
        """Itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes."""
        self.close()

    def steps(self) -> list[int]:
        """The steps on disk that are whole, oldest first."""
        self.wait()
        return self._steps.sealed()

    @property
    def counts(self) -> Mapping[str, Any]:
        """What was counted up to the state that the run goes on from, as given to `save`."""
        self.wait()
        return self._counts

    def save(
        self,
        state: TrainState,
        data: Any = None,
        *,
        every: int = 1,
        counts: Mapping[str, Any] | None = None,
    ) -> None:
        """Begins to write a state, once the one before is written; it may then be donated.

        A folder that holds steps is written to once `resume` or `restore` has said where the run
        goes on. Steps after that one, from which a run was taken back or which are damaged, are
        removed as soon as the state is stored, and that is logged.

        Args:
          state: after any step.
          data: whatever else is needed to go on, as JSON keeps it.
          every: steps between two states of the unbroken run. The newest that stay are among
            those; one between them, which a run that was cut off has left, goes after the next.
          counts: what a loop counts beside the state, as JSON keeps it.

        Raises:
          OSError: the state before this one could not be written.
          ValueError: the state does not follow on the step that the run goes on from; two arrays of
            it share one path; Orbax does not store what the state before this one holds.
          TypeError: the state or the data cannot be saved.
        """
        if np.ndim(state.step):
            raise TypeError(
                f'a checkpoint is of one state; got a stack of {state.step.shape[0]}. Keep members '
                'apart, by pj.unstack, each in a folder of its own'
            )
        about = {
            'specs': _state.specs(state),
            'data': _position.kept('data', data),
            'counts': _position.kept('counts', dict(counts or {})),
        }
        arrays, step = _state.held(state), int(state.step)
        self.check(state)
        if _processes.several():  # they meet while they write, and may not meet elsewhere meanwhile
            self._write(step, arrays, about, every)
        else:
            self._writing = self._thread.submit(self._write, step, arrays, about, every)

    def check(self, state: TrainState) -> None:
        """Refuses a state that does not follow on the step that the run goes on from.

        Raises:
          OSError: the state that is being written could not be.
          ValueError: there are steps, and neither `resume` nor `restore` has said which one that
            is; or the state is from before it.
        """
        self.wait()
        step = int(state.step)
        # once the run has its place the disk is not asked: what it refuses, the writing tells
        if self._at is None and (found := self._steps.sealed()):
            raise ValueError(
                f'a run goes on from one of its steps; {str(self._folder)!r} holds {found}, and '
                'none was taken. Call resume or restore first, or choose another folder'
            )
        if self._at is not None and step < self._at:
            raise ValueError(
                f'a run goes on from its step {self._at}: received a state of step {step}. Take it '
                'back by restore(step=...), or choose another folder'
            )

    def resume(self, state: TrainState, batches: Any, *, fall_back: bool = False) -> TrainState:
        """Goes on where the run stopped, or begins it.

        Args:
          state: a fresh one, as from `start`.
          batches: a fresh iterator that says where it stands: by `state` and `restore`, or by
            grain's `get_state` and `set_state`; it is put where the run stopped.
          fall_back: as in `restore`.

        Returns:
          The newest state that was saved, or the fresh one.

        Raises:
          CheckpointError: as in `restore`.
          ValueError: as in `restore`, or from the iterator: it is another than that of the run.
          TypeError: the iterator does not say where it stands.
        """
        self.position(batches)
        found = self.restore(state, fall_back=fall_back)
        if found is None:
            return state
        _position.put(batches, found.data)
        return found.state

    @staticmethod
    def position(batches: Any) -> Any:
        """Where an iterator stands, as JSON keeps it.

        Raises:
          TypeError: it does not say, or says what JSON does not keep.
        """
        return _position.position(batches)

    def wait(self) -> None:
        """Waits until all that was saved is on disk.

        Raises:
          OSError: it could not be written; earlier steps are as they were.
          ValueError: Orbax does not store what it holds; likewise.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def restore(
        self, like: TrainState, *, step: int | None = None, fall_back: bool = False
    ) -> Restored | None:
        """The newest state that was saved.

        Args:
          like: a state of the same shapes, as from `start`; arrays are read to where its own live.
          step: one of `steps()` instead of the newest: the run is taken back to it.
          fall_back: where that one is damaged, take the newest before it that is not, and log it.

        Returns:
          The state, or None where nothing was saved yet.

        Raises:
          CheckpointError: a file is damaged, missing or unknown.
          ValueError: the state that was saved has other shapes than `like`, or there is no such
            step.
        """
        found = self.steps()
        if step is not None and step not in found:
            raise ValueError(f'there is no step {step} in {str(self._folder)!r}; there are {found}')
        tried = [one for one in reversed(found) if step is None or one <= step]
        for one in tried:
            try:
                restored, self._counts = self._read(one, like)
            except CheckpointError as error:
                if not fall_back:
                    raise CheckpointError(
                        f'{error}. Pass fall_back=True to take an earlier step'
                    ) from error
                _log.warning('step %d is damaged, an earlier one is taken: %s', one, error)
            else:
                self._at = one
                return restored
        if tried:
            raise CheckpointError(
                f'a step must be whole to go on from; of {tried} in {str(self._folder)!r} none is. '
                'Start anew in another folder'
            )
        return None

    def earlier(self, like: TrainState, every: int) -> Restored | None:
        """The newest state of a multiple of so many steps; the run goes on where it is.

        Steps after the one that the run was taken back to are of a course that it has left.

        Args:
          like: as of `restore`.
          every: as of `save`.

        Returns:
          The state, or None where no such step is on disk.

        Raises:
          CheckpointError: a file is damaged, missing or unknown.
        """
        last = self._at
        found = [s for s in self.steps() if s % every == 0 and (last is None or s <= last)]
        return self._read(found[-1], like)[0] if found else None

    def close(self) -> None:
        """Waits for what is being written, and lets others write to the folder."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._steps.close()
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _write(
        self, step: int, arrays: Mapping[str, Any], about: Mapping[str, Any], every: int
    ) -> None:
        try:
            self._steps.write(step, arrays, about, self._at, every)
        except Exception as error:
            size = sum(array.nbytes for array in arrays.values())
            failed = (
                f'step {step} could not be saved ({size:,} bytes) in {str(self._folder)!r}: '
                f'{error}. Earlier steps are as they were'
            )
            if (number := _disk.failure(error)) is not None:
                said = f'{failed}. Free space, or choose another place'
                raise OSError(number, said) from error
            raise ValueError(f'{failed}. Give a state that Orbax stores') from error
        self._at, self._counts = step, about['counts']

    def _read(self, step: int, like: TrainState) -> tuple[Restored, Mapping[str, Any]]:
        """A state, and what was counted up to it; earlier versions counted nothing."""
        about = self._steps.about(step)
        want = _state.specs(like)
        if wrong := differences(want, about['specs']):
            raise ValueError(
                f'the state of step {step} in {str(self._folder)!r} must be like the one given: '
                f'{wrong}. Make it with the same method and optimizer'
            )
        arrays = self._steps.arrays(step, _state.targets(like))
        restored = Restored(_state.rebuilt(like, arrays), about['data'], step)
        return restored, about.get('counts', {})


def check_free(directory: str | os.PathLike[str]) -> None:
    """Refuses the folder of a run that a process writes to at this moment.

    Args:
      directory: as given to `Checkpoints`.

    Raises:
      BlockingIOError: a process writes to it.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     check_free(directory)
    """
    Lock(Path(directory)).release()
