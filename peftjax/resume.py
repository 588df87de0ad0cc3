"""Checkpoints of a run: a training that was cut off goes on as if it had not been.

run.json        what the run is made of: the method and its sites, the base's fingerprint, settings
lock            held by the process that writes
steps/<n>/      the state after n batches, as Orbax stores it, and the sha256 of every file
"""

import concurrent.futures
import errno
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peftjax import _manifest, _position, _processes, _serialize, _state
from peftjax._fingerprint import Fingerprint
from peftjax._lock import FILE as LOCK  # noqa: F401
from peftjax._lock import Lock
from peftjax._manifest import CheckpointError
from peftjax._peft import Peft
from peftjax._shapes import differences
from peftjax._steps import Steps
from peftjax._types import PyTree
from peftjax._version import __version__
from peftjax.train import TrainState

FILE = 'run.json'
STEPS = 'steps'
_log = logging.getLogger('peftjax')


class Restored(NamedTuple):
    """Where a run stood.

    Attributes:
      state: bit for bit as it was saved.
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
      keep: how many of the newest steps stay on disk.
      other_settings: names of settings that may differ from those of an earlier start.

    Raises:
      BlockingIOError: another process writes to the folder.
      CheckpointError: run.json is damaged, or of another version.
      FileExistsError: the folder holds steps of something else.
      ValueError: the folder is of another run, or `keep` is not positive.

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
        if keep < 1:
            raise ValueError(f'keep must be at least 1: received {keep}')
        self._folder = Path(directory).absolute()
        own = _own(peft, params, settings or {})
        self._lock: Lock | None = _processes.led(
            'take the run folder', lambda: _take(self._folder, own, other_settings)
        )
        try:
            self._steps = Steps(self._folder / STEPS, keep, f'peftjax {__version__}')
        except BaseException:
            self._release()
            raise
        self._thread = concurrent.futures.ThreadPoolExecutor(1, 'checkpoints')
        self._writing: concurrent.futures.Future[None] | None = None

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

    def save(self, state: TrainState, data: Any = None) -> None:
        """Begins to write a state, once the one before is written; it may then be donated.

        Args:
          state: after any step.
          data: whatever else is needed to go on, as JSON keeps it.

        Raises:
          OSError: the state before this one could not be written.
          TypeError: the state or the data cannot be saved.
        """
        if np.ndim(state.step):
            raise TypeError(
                f'a checkpoint is of one state; got a stack of {state.step.shape[0]}. Keep members '
                'apart, by pj.unstack, each in a folder of its own'
            )
        about = {'specs': _state.specs(state), 'data': _position.kept('data', data)}
        arrays, step = _state.held(state), int(state.step)
        self.wait()
        if _processes.several():  # they meet while they write, and may not meet elsewhere meanwhile
            self._write(step, arrays, about)
        else:
            self._writing = self._thread.submit(self._write, step, arrays, about)

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
          step: one of `steps()` instead of the newest.
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
                return self._read(one, like)
            except CheckpointError as error:
                if not fall_back:
                    raise CheckpointError(
                        f'{error}. Pass fall_back=True to take an earlier step'
                    ) from error
                _log.warning('step %d is damaged, an earlier one is taken: %s', one, error)
        if tried:
            raise CheckpointError(
                f'a step must be whole to go on from; of {tried} in {str(self._folder)!r} none is. '
                'Start anew in another folder'
            )
        return None

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

    def _write(self, step: int, arrays: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        try:
            self._steps.write(step, arrays, about)
        except Exception as error:  # TensorStore reports a failure of the disk as a ValueError.
            size = sum(array.nbytes for array in arrays.values())
            raise OSError(
                getattr(error, 'errno', None),
                f'step {step} could not be saved ({size:,} bytes) in {str(self._folder)!r}: '
                f'{error}. Earlier steps are as they were. Free space, or choose another place',
            ) from error

    def _read(self, step: int, like: TrainState) -> Restored:
        about = self._steps.about(step)
        want = _state.specs(like)
        if wrong := differences(want, about['specs']):
            raise ValueError(
                f'the state of step {step} in {str(self._folder)!r} must be like the one given: '
                f'{wrong}. Make it with the same method and optimizer'
            )
        arrays = self._steps.arrays(step, _state.targets(like))
        return Restored(_state.rebuilt(like, arrays), about['data'], step)


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


def _own(peft: Peft, params: PyTree, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the run is made of, as JSON keeps it."""
    return {
        'method': str(peft.method),
        'peft': _serialize.encode(peft),
        'fingerprint': _serialize.encode(Fingerprint.of(params)),
        'settings': _position.kept('settings', dict(settings)),
    }


def _take(folder: Path, own: Mapping[str, Any], other: tuple[str, ...]) -> Lock:
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
    if path.exists():
        if wrong := _differing(_read(path, own), own, other):
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
    part = path.with_name(f'.{path.name}.part')
    part.write_text(json.dumps(body, indent=1) + '\n', encoding='utf-8')
    part.replace(path)


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
    elif found['peft'] != own['peft']:
        wrong.append('the sites that the method is attached to are others')
    elif found['fingerprint'] != own['fingerprint']:
        paths = _decoded(found['fingerprint']).apart(_decoded(own['fingerprint']))
        if paths:
            wrong.append(f'theta holds other values at {len(paths)} paths, such as {paths[0]!r}')
    before, now = found['settings'], own['settings']
    wrong += [
        changed(name, repr(before.get(name)), repr(now.get(name)))
        for name in {**before, **now}
        if name not in other and before.get(name) != now.get(name)
    ]
    return wrong
