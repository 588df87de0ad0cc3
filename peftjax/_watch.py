"""What becomes of losses while a device computes on, and of steps that are not finite."""

import logging
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from peftjax.resume import Checkpoints
from peftjax.train import TrainState

Policy = Literal['skip', 'stop', 'restore']
OnLoss = Callable[[int, float], Any]
"""`on_loss(step, loss)`, called for every step in order, some steps late."""

_log = logging.getLogger('peftjax')


class NotFiniteError(ValueError):
    """Losses or gradients were not finite, and the policy ends the training for that."""


class Watch:
    """Losses on their way from the device, and what follows on those that are not finite."""

    def __init__(
        self,
        on_loss: OnLoss | None,
        policy: Policy,
        patience: int,
        checkpoints: Checkpoints | None,
        every: int,
        skipped: int,
    ):
        """Nothing was begun yet.

        Args:
          on_loss: what is done with each loss.
          policy: what follows on a step that is not finite, as of `fit`.
          patience: of how many the run ends.
          checkpoints: to restore from, and what they counted before.
          every: steps between those that the unbroken run has too.
          skipped: steps that made no update before.

        Raises:
          ValueError: there is no such policy, or nothing to restore from.
        """
        if policy not in ('skip', 'stop', 'restore'):
            raise ValueError(f"not_finite must be 'skip', 'stop' or 'restore': got {policy!r}")
        if policy == 'restore' and checkpoints is None:
            raise ValueError("not_finite='restore' needs checkpoints to restore from")
        self._on_loss, self._policy, self._patience = on_loss, policy, patience
        self._checkpoints, self._every = checkpoints, every
        self._waiting: list[tuple[int, jax.Array, jax.Array]] = []
        counts = {} if checkpoints is None else checkpoints.counts
        self._skipped, self._bad = skipped, list(counts.get('bad', ()))
        self._row, self._restored = counts.get('row', 0), counts.get('restored', 0)

    def counts(self) -> dict[str, Any]:
        """What a run that goes on must know: steps in a row, restorations, steps to settle."""
        return {'row': self._row, 'restored': self._restored, 'bad': self._bad}

    def add(self, step: int, loss: jax.Array, state: TrainState) -> None:
        """Takes note of a step that was begun."""
        self._waiting.append((step, loss, jnp.copy(state.skipped)))

    def fetch(self, everything: bool = False) -> None:
        """Hands losses on, all but the newest unless told."""
        cut = len(self._waiting) if everything else len(self._waiting) - 1
        now, self._waiting = self._waiting[:cut], self._waiting[cut:]
        for step, loss, skipped in jax.device_get(now) if now else ():
            if self._on_loss is not None:
                self._on_loss(int(step), float(loss))
            self._row = self._row + 1 if skipped > self._skipped else 0
            if self._row:
                self._bad.append(int(step))
                self._judge(int(step), float(loss))
            self._skipped = skipped

    def settled(self, state: TrainState, step: int) -> TrainState:
        """The state to go on from, after what has happened up to a step.

        When that is asked must not depend on where a run was cut off, nor on what else is due; what
        was learned of later steps meanwhile waits.
        """
        bad = any(one <= step for one in self._bad)
        self._bad = [one for one in self._bad if one > step]
        return self._again(state) if bad and self._policy == 'restore' else state

    def _judge(self, step: int, loss: float) -> None:
        _log.warning('step %d made no update: not finite (its loss: %s)', step, loss)
        if self._policy == 'stop' or self._row >= self._patience:
            raise NotFiniteError(
                f'losses, gradients and updates must be finite; those of step {step} are not (its '
                f'loss is {loss}), {self._row} in a row. Look at the data, or lower the rate'
            )

    def _again(self, state: TrainState) -> TrainState:
        """Phi and optimizer of the newest checkpoint, at the step where the run is.

        Of those that the unbroken run has too: others were left where this one was cut off.
        """
        assert self._checkpoints is not None
        found = self._checkpoints.earlier(state, self._every)
        self._restored += 1
        if found is None or self._restored > self._patience:
            tried = 'nothing was saved yet' if found is None else (
                f'{self._patience} restorations did not help')  # fmt: skip
            raise NotFiniteError(f'losses and gradients must be finite, and {tried}')
        _log.warning('phi and optimizer are those of step %d again', found.step)
        return state._replace(phi=found.state.phi, opt_state=found.state.opt_state)
