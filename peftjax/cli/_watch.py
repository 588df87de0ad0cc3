"""What is measured and shown while a method is trained."""

import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from peftjax.cli._metrics import Metrics


class Watch:
    """Measures training: fetches each loss while the next step runs, stops for evaluations.

    Args:
      name: of what is trained.
      rates: the learning rate of each step.
      bar: where to show.
      metrics: where to write; None writes nothing.

    Attributes:
      seconds: of training, without compilation and evaluations.
      tokens: trained on, padding not counted.
    """

    def __init__(self, name: str, rates: np.ndarray, bar: Any, metrics: Metrics | None = None):
        self.seconds, self.tokens = 0.0, 0
        self._name, self._rates, self._bar, self._metrics = name, rates, bar, metrics
        self._waiting: tuple[int, jax.Array, int] | None = None
        self._since: float | None = None
        self._recent: list[float] = []

    def begin(self) -> None:
        """Goes on measuring time."""
        self._since = time.perf_counter() if self._since is None else self._since

    def step(self, step: int, loss: jax.Array, tokens: int) -> None:
        """Takes note of a step that was begun.

        Raises:
          ValueError: the loss of the one before is not finite.
        """
        self._fetch()
        self._waiting = (step, loss, tokens)

    def flush(self) -> None:
        """Waits for the last step.

        Raises:
          ValueError: its loss is not finite.
        """
        self._fetch()
        self._since = None

    def tick(self) -> None:
        """Shows a step that has no loss."""
        self._bar.update()

    def report(self, step: int, found: Mapping[str, float]) -> None:
        """Says how things stand.

        Args:
          step: how many were made.
          found: what an evaluation found, by name; empty where there was none.
        """
        said = [f'step {step}']
        if self._recent:
            said += [f'loss {np.mean(self._recent):.4f}']
        if found:
            self._write(step, {**found, 'seconds': self.seconds})
            said += [f'{name.replace("_", " ")} {value:.4f}' for name, value in found.items()]
        if self.seconds:
            said += [f'{self.tokens / self.seconds:,.0f} tokens/s']
        self._recent = []
        if len(said) > 1:
            self._bar.write('  '.join(said))
        self._bar.unpause()  # compilation and evaluations say nothing of the time left

    def _fetch(self) -> None:
        if self._waiting is None:
            return
        step, loss, tokens = self._waiting
        self._waiting = None
        value = float(loss)
        now = time.perf_counter()
        assert self._since is not None
        self.seconds, self._since = self.seconds + now - self._since, now
        if not np.isfinite(value):
            raise ValueError(
                f'{self._name}: the loss must stay finite; it is {value} at step {step}. Lower the '
                f'learning rate (now {self._rates.max():g})'
            )
        self.tokens += tokens
        self._recent.append(value)
        rate = float(self._rates[step - 1])
        known = {'loss': value, 'rate': rate, 'tokens': self.tokens, 'seconds': self.seconds}
        self._write(step, known)
        speed = f'{self.tokens / self.seconds:,.0f}'
        self._bar.set_postfix({'loss': f'{value:.4f}', 'tokens/s': speed}, refresh=False)
        self._bar.update()

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if self._metrics is not None:
            self._metrics.add(step, values)
