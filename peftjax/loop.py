"""A loop over a training step, with what a long run needs; users may write their own instead."""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from peftjax import _processes
from peftjax._counts import whole
from peftjax._types import PyTree
from peftjax._watch import NotFiniteError as NotFiniteError
from peftjax._watch import OnLoss, Policy, Watch
from peftjax.resume import Checkpoints
from peftjax.train import Step, TrainState

_log = logging.getLogger('peftjax')


class Every(NamedTuple):
    """Something that happens between steps.

    Attributes:
      steps: after how many steps, and again after as many.
      do: `do(step, state)`; it must not keep the state, which is donated. It may raise `Stop`.
        The losses of all steps before were handed on. A `TrainState` that it returns is gone on
        from. Where it has `over(state)`, as `KeepBest` has, the run ends as soon as that is true:
        after it happened, or before the first step.

    Example:
      >>> event = Every(100, lambda step, state: print(f'{step} steps'))
      >>> event.due(150), event.due(200)
      (False, True)
    """

    steps: int
    do: Callable[[int, TrainState], Any]

    def due(self, step: int) -> bool:
        """Whether it happens after this step."""
        return step % self.steps == 0


class At(NamedTuple):
    """Something that happens after chosen steps.

    Attributes:
      steps: after which ones.
      do: as of `Every`.

    Example:
      >>> At({1, 10, 100}, lambda step, state: print(f'{step} steps')).due(10)
      True
    """

    steps: Collection[int]
    do: Callable[[int, TrainState], Any]

    def due(self, step: int) -> bool:
        """Whether it happens after this step."""
        return step in self.steps


class Stop(Exception):
    """Raised by what happens between steps: the training ends here, in good order."""


class Terminated(SystemExit):
    """The process was told to end, and did so after a step and a checkpoint; exit code 143."""


def fit(
    step: Step,
    params: PyTree,
    state: TrainState,
    batches: Iterator[Any],
    *,
    steps: int,
    on_loss: OnLoss | None = None,
    events: Sequence[Every | At] = (),
    checkpoints: Checkpoints | None = None,
    save_every: int = 100,
    not_finite: Policy = 'skip',
    patience: int = 10,
    fetch_every: int = 10,
) -> TrainState:
    """Makes steps until there were so many.

    Nothing is fetched from the device step by step: losses come in groups, one step behind.
    A run with checkpoints goes on by `checkpoints.resume` before `fit`. On SIGTERM it ends after
    the step that is running, with a checkpoint.

    Args:
      step: as from `train_step`.
      params: theta.
      state: to begin with; it is donated. Where it has seen batches already, as many fewer follow.
      batches: an iterator, past those that were seen. With checkpoints it must say where it
        stands: by `state` and `restore`, or by grain's `get_state` and `set_state`.
      steps: how many batches the whole run sees.
      on_loss: what is done with each loss.
      events: what happens between steps, before a checkpoint of the same step.
      checkpoints: where states are saved: every `save_every` steps, at the end, on SIGTERM.
      save_every: steps between checkpoints. One that is left between two of them, where a run
        ends, goes after the next.
      not_finite: what follows on a step that made no update because its loss, its gradient or what
        the optimizer made of it was not finite. `'skip'` logs it and goes on; `'stop'` ends the
        training; `'restore'` goes on from phi and optimizer of the newest checkpoint of a multiple
        of `save_every`, with the next batch, as soon as it is known after a multiple of
        `fetch_every` or `save_every`.
      patience: how many such steps in a row, or restorations in all, end the training too. Both are
        counted in the checkpoints: a run that was cut off ends as the unbroken one.
      fetch_every: steps between two fetches of losses.

    Returns:
      The last state.

    Raises:
      NotFiniteError: as said by `not_finite` and `patience`; the newest checkpoint is finite.
      Terminated: on SIGTERM.
      ValueError: there are too few batches, or a number is not positive, or the folder of the
        checkpoints holds steps that the state does not follow on.
      TypeError: the batches are no iterator or, with checkpoints, do not say where they stand; the
        state is a stack; an event is none, or a number no integer.

    Example:
      >>> import itertools, jax, jax.numpy as jnp, optax, peftjax as pj
      >>> params, x = {'kernel': jnp.ones((3, 4))}, jnp.ones((2, 3))
      >>> model = lambda params, x: x @ params['kernel']
      >>> forward, phi = pj.lora_wrap(
      ...     model, params, x, key=jax.random.key(0), rank=2, target='kernel')
      >>> tx, losses = optax.sgd(0.1), []
      >>> step = pj.train_step(lambda p, phi, x, key: (forward(p, phi, x) ** 2).mean(), tx)
      >>> state = pj.fit(
      ...     step, params, pj.start(tx, phi, jax.random.key(1)), itertools.repeat(x), steps=20,
      ...     on_loss=lambda step, loss: losses.append(loss))
      >>> int(state.step), len(losses), losses[-1] < losses[0]
      (20, 20, True)
    """
    for name, value in (
        ('save_every', save_every), ('patience', patience), ('fetch_every', fetch_every),
    ):  # fmt: skip
        whole(name, value)
    _check(state, batches, events)
    if checkpoints is not None:
        checkpoints.position(batches)  # refused before the first step, not after it
        checkpoints.check(state)
    watch = Watch(on_loss, not_finite, patience, checkpoints, save_every, int(state.skipped))
    if _over(events, state):
        return state
    with _terminations() as told:
        for count in range(int(state.step) + 1, steps + 1):
            state, loss = step(params, state, _next(batches, count, steps))
            watch.add(count, loss, state)
            due = [event for event in events if event.due(count)]
            save, group = count % save_every == 0, count % fetch_every == 0
            if due or save or count == steps:
                watch.fetch(everything=True)
            elif group:
                watch.fetch()
            if save or group:
                state = watch.settled(state, count if save else count - 1)
            state, stopped = _happen(due, count, state)
            if ended := stopped or told(count) or count == steps:
                watch.fetch(everything=True)
            if checkpoints is not None and (save or ended):
                where = checkpoints.position(batches)
                checkpoints.save(state, where, every=save_every, counts=watch.counts())
            if ended:
                break
    if checkpoints is not None:
        checkpoints.wait()
    if int(state.step) < steps and told(int(state.step)):
        _log.warning('told to end: ended after step %d', int(state.step))
        raise Terminated(128 + signal.SIGTERM)
    return state


def _check(state: TrainState, batches: Any, events: Any) -> None:
    """Refuses what would end the training in its middle."""
    if jnp.ndim(state.step):
        raise TypeError(
            f'fit trains one state; got a stack of {state.step.shape[0]}. Write the loop of a '
            'vmapped step yourself, as examples/13_many_at_once.py does'
        )
    if not hasattr(batches, '__next__'):
        raise TypeError(
            f'batches must be an iterator: received {type(batches).__name__}. Give iter(batches), '
            'or itertools.cycle(batches)'
        )
    if isinstance(events, Every | At) or not all(isinstance(one, Every | At) for one in events):
        raise TypeError(f'events must be a list of pj.Every and pj.At: received {events!r:.200}')
    for i, event in enumerate(events):
        if isinstance(event, Every):
            whole(f'events[{i}].steps', event.steps)
        elif isinstance(event.steps, str) or not isinstance(event.steps, Collection):
            raise TypeError(
                f'events[{i}].steps must be a set of steps: received {event.steps!r:.200}. Give '
                '{1, 10}, say'
            )


def _next(batches: Iterator[Any], count: int, steps: int) -> Any:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(
            f'there must be a batch for each of {steps} steps; they ended before step {count}. '
            'Repeat the data, or make fewer steps'
        ) from None


def _happen(due: Sequence[Every | At], count: int, state: TrainState) -> tuple[TrainState, bool]:
    """Lets happen what is due: the state to go on from, and whether the training ends here."""
    stopped = False
    for event in due:
        try:
            found = event.do(count, state)
        except Stop:
            stopped = True
        else:
            state = found if isinstance(found, TrainState) else state
    return state, stopped or _over(due, state)


def _over(events: Sequence[Every | At], state: TrainState) -> bool:
    """Whether one of them says of the state that the training is at its end."""
    ends = [getattr(event.do, 'over', None) for event in events]
    return any(over(state) for over in ends if over is not None)


@contextlib.contextmanager
def _terminations() -> Iterator[Callable[[int], bool]]:
    """Whether the process was told to end, by the number of the step that was made."""
    told: list[int] = []
    if _processes.several():  # all must end after the same step, on which JAX lets them agree

        def agreed(step: int) -> bool:
            told.extend([step] if _processes.agreed(step) else [])
            return bool(told)

        yield agreed
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # Python delivers signals to the main thread alone
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        yield lambda step: bool(told)
    finally:
        signal.signal(signal.SIGTERM, before)
