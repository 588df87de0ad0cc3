"""The best phi so far, by an evaluation between steps, and an end where it gets no better."""

import dataclasses
import logging
import numbers
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax._counts import whole
from peftjax._types import Phi
from peftjax.train import Best, TrainState

_log = logging.getLogger('peftjax')


@dataclasses.dataclass(frozen=True)
class KeepBest:
    """Evaluates phi between steps, keeps the best one, and ends a run that gets no better.

    What is kept lies in the state (`state.best`, made by `start(..., keep_best=True)`): copies, on
    the devices where phi is. So each checkpoint has it, and a run that goes on ends as the unbroken
    one: with the same best phi, after the same step; one that was ended stays so.

    Attributes:
      evaluate: `evaluate(step, phi)` to a number, or to numbers by name; the same in every process
        where there are several.
      by: the name of the number that counts, where there are names.
      maximize: whether more is better.
      min_delta: what an improvement must exceed.
      patience: after so many evaluations in a row without improvement the run ends; None: never.
      of: from the state to the phi that is evaluated and kept: `averaged` for the moving average.

    Raises:
      ValueError: `min_delta` is negative or `patience` not positive; (from the call) the state
        keeps no best phi, or the evaluation gives no number of that name.
      TypeError: `patience` is no integer; (from the call) what the evaluation gives is no real
        number, such as the None of a `return` that was forgotten.

    Example:
      >>> import itertools, jax, jax.numpy as jnp, optax, peftjax as pj
      >>> loss = lambda params, phi, batch, key: ((phi['w']['a'] - 1) ** 2).sum()
      >>> held_back = lambda step, phi: abs(float(phi['w']['a'][0]) - 0.5)  # it overfits after 0.5
      >>> tx, phi = optax.sgd(0.02), {'w': {'a': jnp.zeros(1)}}
      >>> state = pj.fit(
      ...     pj.train_step(loss, tx), {}, pj.start(tx, phi, jax.random.key(0), keep_best=True),
      ...     itertools.repeat(None), steps=100,
      ...     events=[pj.Every(5, pj.KeepBest(held_back, patience=2))])
      >>> int(state.best.step), int(state.step), round(float(state.best.phi['w']['a'][0]), 2)
      (15, 25, 0.46)

    Reference: early stopping is described by Prechelt, Early Stopping - But When?, 1998.
    """

    evaluate: Callable[[int, Phi], float | Mapping[str, float]]
    _: dataclasses.KW_ONLY
    by: str | None = None
    maximize: bool = False
    min_delta: float = 0.0
    patience: int | None = None
    of: Callable[[TrainState], Phi] = operator.attrgetter('phi')

    def __post_init__(self) -> None:
        if not self.min_delta >= 0:
            raise ValueError(f'min_delta must be at least 0: received {self.min_delta}')
        if self.patience is not None:
            whole('patience', self.patience)

    def __call__(self, step: int, state: TrainState) -> TrainState:
        """The state with the best phi after this step."""
        old, phi = _best(state), self.of(state)
        value, before = self._value(self.evaluate(step, phi)), np.float32(old.value)
        better = self._is_better(float(value), float(before))
        level = logging.INFO if np.isfinite(value) else logging.WARNING
        best = 'the best so far' if better else f'the best is {before:g} of step {int(old.step)}'
        _log.log(level, 'step %d was evaluated to %g, %s', step, value, best)
        if not better:
            return state._replace(best=old._replace(stale=old.stale + 1))
        # in the dtype and on the devices of what it replaces: the step is compiled for those
        kept = jax.tree.map(lambda own, new: jnp.array(new, own.dtype), old.phi, phi)
        fill = jnp.full_like
        new = Best(kept, fill(old.value, value), fill(old.step, step), fill(old.stale, 0))
        return state._replace(best=new)

    def over(self, state: TrainState) -> bool:
        """Whether the run has come to its end."""
        stale = _best(state).stale
        return self.patience is not None and int(stale) >= self.patience

    def _value(self, found: float | Mapping[str, float]) -> np.float32:
        """The number that counts, in the precision of the one that it is compared with."""
        if self.by is None and not isinstance(found, Mapping):
            return _real(found)
        if self.by is not None and isinstance(found, Mapping) and self.by in found:
            return _real(found[self.by])
        names = sorted(found) if isinstance(found, Mapping) else 'a number without a name'
        raise ValueError(f'evaluate must give a number by={self.by!r}; it gives {names}')

    def _is_better(self, value: float, before: float) -> bool:
        gain = value - before if self.maximize else before - value
        return np.isfinite(value) and (np.isnan(before) or gain > self.min_delta)


def _real(number: Any) -> np.float32:
    """A real number, of Python or an array without axes; NumPy would make NaN of None."""
    axes, dtype = np.ndim(number), getattr(number, 'dtype', np.dtype(object))
    array = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    plain = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if axes or not (plain or array):
        raise TypeError(
            f'evaluate must give a real number: received {number!r:.80}. Return the float of a mean'
        )
    return np.float32(float(number))


def _best(state: TrainState) -> Best:
    if state.best is None:
        raise ValueError(
            'the state must have a place for the best phi: make it by start(..., keep_best=True)'
        )
    return state.best
