"""What is measured and shown while a method is trained."""

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from peftjax.cli._metrics import Metrics


class Watch:
    """Measures training, but for compilation and evaluations.

    Args:
      name: of what is trained.
      rates: the learning rate of each step.
      bar: where to show.
      metrics: where to write; None writes nothing. What it holds of an earlier start counts.

    Attributes:
      seconds: of training.
      tokens: trained on, padding not counted.
    """

    def __init__(self, name: str, rates: np.ndarray, bar: Any, metrics: Metrics | None = None):
        earlier = [row for row in metrics.rows if 'loss' in row] if metrics is not None else []
        self.seconds = earlier[-1]['seconds'] if earlier else 0.0
        self.tokens = earlier[-1]['tokens'] if earlier else 0
        self._name, self._rates, self._bar, self._metrics = name, rates, bar, metrics
        self._drawn: deque[int] = deque()
        self._since: float | None = None
        self._recent: list[float] = []
        self._bar.update(len(earlier))

    def begin(self, tokens: int) -> None:
        """Takes note of a batch, whose step begins now."""
        self._since = time.perf_counter() if self._since is None else self._since
        self._drawn.append(tokens)

    def loss(self, step: int, value: float) -> None:
        """Takes note of a loss, those of all steps in order.

        Raises:
          ValueError: it is not finite.
        """
        now = time.perf_counter()
        assert self._since is not None
        self.seconds, self._since = self.seconds + now - self._since, now
        self._check(value, f'at step {step}')
        self.tokens += self._drawn.popleft()
        self._recent.append(value)
        rate = float(self._rates[step - 1])
        known = {'loss': value, 'rate': rate, 'tokens': self.tokens, 'seconds': self.seconds}
        self._write(step, known)
        speed = f'{self.tokens / self.seconds:,.0f}'
        self._bar.set_postfix({'loss': f'{value:.4f}', 'tokens/s': speed}, refresh=False)
        self._bar.update()

    def last(self, step: int, value: float) -> None:
        """Takes note of a loss after the last update, which no step has seen.

        Raises:
          ValueError: it is not finite.
        """
        self._check(value, f'after step {step}, the last one')

    def _check(self, value: float, when: str) -> None:
        if not np.isfinite(value):
            raise ValueError(
                f'{self._name}: the loss must stay finite; it is {value} {when}. Lower the '
                f'learning rate (now {self._rates.max():g})'
            )

    def tick(self) -> None:
        """Shows a step that has no loss."""
        self._bar.update()

    def report(self, step: int, found: Mapping[str, float]) -> None:
        """Says how things stand; the time until the next batch does not count.

        Args:
          step: how many were made.
          found: what an evaluation found, by name; empty where there was none.

        Raises:
          ValueError: it is not finite.
        """
        for name, value in found.items():
            if not np.isfinite(value):
                raise ValueError(
                    f'{self._name}: what an evaluation finds must be finite; {name} is {value} '
                    f'after step {step}. Look at the data, or lower the learning rate'
                )
        said = [f'step {step}']
        if self._recent:
            said += [f'loss {np.mean(self._recent):.4f}']
        if found:
            self._write(step, {**found, 'seconds': self.seconds})
            said += [f'{name.replace("_", " ")} {value:.4f}' for name, value in found.items()]
        if self.seconds:
            said += [f'{self.tokens / self.seconds:,.0f} tokens/s']
        self._recent, self._since = [], None
        if len(said) > 1:
            self._bar.write('  '.join(said))
        self._bar.unpause()  # compilation and evaluations say nothing of the time left

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if self._metrics is not None:
            self._metrics.add(step, values)
