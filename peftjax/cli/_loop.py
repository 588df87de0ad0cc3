"""Training as the commands do it: watched, evaluated on the way, saved where asked for."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import peftjax as pj
from peftjax.cli._watch import Watch


class Evaluation(NamedTuple):
    """What is found out on the way.

    Attributes:
      of: from phi to what is found, by name; None reports the losses of training alone.
      times: how often after the first step, evenly spread; the last one is at the end.
    """

    of: Callable[[Any], Mapping[str, float]] | None
    times: int

    def report(self, step: int, phi: Any, watch: Watch) -> None:
        """Evaluates, and says how things stand."""
        watch.report(step, {} if self.of is None else self.of(phi))


class Saving(NamedTuple):
    """Where states are kept while a run goes on.

    Attributes:
      checkpoints: of the run.
      every: so many steps.
    """

    checkpoints: pj.Checkpoints
    every: int


class Drawn(Iterator[Any]):
    """Batches as a step takes them, each noted by the watch; it stands where they stand."""

    def __init__(self, batches: Any, of: Callable[[Any], tuple[Any, int]], watch: Watch):
        self._batches, self._of, self._watch = batches, of, watch

    def __next__(self) -> Any:
        batch, tokens = self._of(next(self._batches))
        self._watch.begin(tokens)
        return batch

    def state(self) -> Any:
        """Where the batches stand."""
        return self._batches.state()

    def restore(self, state: Any) -> None:
        """Goes there."""
        self._batches.restore(state)


def train(
    program: Callable[..., Any],
    params: Any,
    state: Any,
    batches: Drawn,
    steps: int,
    watch: Watch,
    last: Callable[[Any], float],
    evaluation: Evaluation | None = None,
    saving: Saving | None = None,
) -> Any:
    """Makes steps until there were so many.

    Args:
      program: `program(params, state, batch)` to the next state and the loss.
      params: theta.
      state: to start from, a `TrainState`.
      batches: those that follow.
      steps: of the whole run.
      watch: what measures.
      last: from phi to a loss, asked after the last step: the losses of steps are before updates.
      evaluation: what happens between steps.
      saving: where states are kept.

    Returns:
      The last state.

    Raises:
      ValueError: the loss does not stay finite.
      Terminated: the process was told to end.
    """
    events = []
    if evaluation is None or evaluation.of is None:  # an evaluation at the end says as much
        events = [pj.At({steps}, lambda step, now: watch.last(step, last(now.phi)))]
    if evaluation is not None:
        times = evaluation.times
        marks = frozenset(round(steps * i / times) for i in range(1, times + 1))
        events += [pj.At(marks, lambda step, now: evaluation.report(step, now.phi, watch))]
    return pj.fit(
        program,
        params,
        state,
        batches,
        steps=steps,
        on_loss=watch.loss,
        events=events,
        checkpoints=None if saving is None else saving.checkpoints,
        save_every=steps if saving is None else saving.every,
        not_finite='stop',
        fetch_every=1,
    )
