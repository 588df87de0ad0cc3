"""The loop that trains phi: steps, and evaluations between them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

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


def train(
    program: Callable[..., Any],
    params: Any,
    state: Any,
    batches: Iterable[tuple[Any, int]],
    steps: int,
    watch: Watch,
    evaluation: Evaluation | None = None,
) -> Any:
    """Makes a step for each batch.

    Args:
      program: `program(params, state, batch)` to the next state and the loss.
      params: theta.
      state: to start from, a `TrainState`.
      batches: of each step, with the number of its tokens.
      steps: how many there are.
      watch: what measures.
      evaluation: what happens between steps.

    Returns:
      The last state.

    Raises:
      ValueError: the loss does not stay finite.
    """
    times = 0 if evaluation is None else evaluation.times
    marks = {round(steps * i / times) for i in range(1, times + 1)}
    for step, (batch, tokens) in enumerate(batches, 1):
        watch.begin()
        state, loss = program(params, state, batch)
        watch.step(step, loss, tokens)
        if evaluation is not None and step in marks:
            watch.flush()
            evaluation.report(step, state.phi, watch)
    watch.flush()
    return state
