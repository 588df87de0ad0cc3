"""Trains one method on a language model's rows, and measures on the way."""

import dataclasses
import itertools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peftjax as pj
from peftjax import data
from peftjax.cli._programs import Programs
from peftjax.cli.language._metrics import Metrics
from peftjax.cli.language._task import Task, arguments, fused


@dataclasses.dataclass(frozen=True)
class Settings:
    """How phi is trained.

    Attributes:
      rate: the highest learning rate.
      steps: updates.
      batch: rows of a step.
      length: tokens of a row.
      pack: whether a row may hold several examples.
      answer_only: whether answers alone are learned.
      warmup: the part of the steps over which the rate rises.
      decay: how it falls afterwards: `cosine`, `linear` or `none`.
      weight_decay: on all that is trained.
      dtype: of the base.
      quantize: how the linear layers of the base are kept; None as they are.
      clip: the most that the norm of all gradients may be.
    """

    rate: float
    steps: int
    batch: int
    length: int
    pack: bool
    answer_only: bool
    warmup: float
    decay: str
    weight_decay: float
    dtype: str
    quantize: str | None
    clip: float = 1.0


class Fitted(NamedTuple):
    """What a fit gives.

    Attributes:
      phi: the trained parameters.
      seconds: of training, without compilation and evaluations.
      tokens: trained on, padding not counted.
      peak_bytes: of the compiled step.
    """

    phi: Any
    seconds: float
    tokens: int
    peak_bytes: int


def schedule(settings: Settings) -> optax.Schedule:
    """The learning rate at each step: it rises, then falls towards zero."""
    rise = round(settings.warmup * settings.steps)
    fall = max(1, settings.steps - rise)
    after = {
        'cosine': optax.cosine_decay_schedule(settings.rate, fall),
        'linear': optax.linear_schedule(settings.rate, 0.0, fall),
        'none': optax.constant_schedule(settings.rate),
    }[settings.decay]
    if not rise:
        return after
    # the first step counts: it is one of those that rise
    before = optax.linear_schedule(settings.rate / rise, settings.rate, max(1, rise - 1))
    return optax.join_schedules([before, after], [rise])


class Fitter:
    """Trains a plan on rows; evaluates it on others."""

    def __init__(self, task: Task, peft: pj.Peft, settings: Settings):
        self.task, self.peft, self.settings = task, peft, settings
        loss = fused(peft, task)
        rates = schedule(settings)
        self.rates = np.asarray(jax.vmap(rates)(jnp.arange(settings.steps)))
        self._tx = optax.chain(
            optax.clip_by_global_norm(settings.clip),
            optax.adamw(rates, weight_decay=settings.weight_decay),
        )
        self._step = Programs(pj.train_step(lambda *args: loss(*args).mean, self._tx))
        self._loss = Programs(jax.jit(lambda params, phi, batch: loss(params, phi, batch)))

    def fit(
        self,
        split: Any,
        seed: int,
        evaluations: int,
        metrics: Metrics,
        bar: Any,
    ) -> Fitted:
        """Trains.

        Args:
          split: rows to `train` on, and those `held` for evaluation, or None.
          seed: of phi, order and dropout.
          evaluations: how many there shall be after the one before the first step.
          metrics: where to write.
          bar: where to show.

        Returns:
          What was found, and what it took.

        Raises:
          ValueError: the loss does not stay finite.
        """
        settings, task = self.settings, self.task
        for_phi, for_steps = jax.random.split(jax.random.key(seed))
        phi = jax.jit(self.peft.init)(for_phi, task.params)
        state = pj.start(self._tx, phi, for_steps)
        marks = {round(settings.steps * i / evaluations) for i in range(evaluations + 1)}
        watch = _Watch(self.rates, metrics, bar)
        for step, batch in enumerate(self._batches(split.train, seed), 1):
            rows = arguments(batch)
            if step == 1:
                self._step.prepare(task.params, state, rows)
                self._report(0, state.phi, split.held, watch)
            watch.begin()
            state, loss = self._step(task.params, state, rows)
            watch.step(step, loss, int((batch.segment_ids > 0).sum()))
            if step in marks:
                watch.flush()
                self._report(step, state.phi, split.held, watch)
        return Fitted(state.phi, watch.seconds, watch.tokens, self._step.peak_bytes)

    def _batches(self, rows: data.Rows, seed: int) -> Iterator[data.LanguageBatch]:
        """As many batches as there are steps."""
        size, steps = self.settings.batch, self.settings.steps
        per_epoch = -(-len(rows) // size)
        batches = data.Batches(rows, size, seed=seed, epochs=-(-steps // per_epoch))
        return itertools.islice(batches, steps)

    def evaluate(self, phi: Any, rows: data.Rows) -> float:
        """The mean loss of all tokens to learn."""
        parts = [
            self._loss(self.task.params, phi, arguments(batch))
            for batch in data.Batches(rows, self.settings.batch, seed=None)
        ]
        total, count = (float(sum(map(float, column))) for column in zip(*parts, strict=True))
        return total / count

    def _report(self, step: int, phi: Any, held: data.Rows | None, watch: '_Watch') -> None:
        """Evaluates, where there are rows for it, and says how things stand."""
        watch.report(step, None if held is None else self.evaluate(phi, held))


class _Watch:
    """Measures training: fetches each loss while the next step runs, stops for evaluations."""

    def __init__(self, rates: np.ndarray, metrics: Metrics, bar: Any):
        self.seconds, self.tokens = 0.0, 0
        self._rates, self._metrics, self._bar = rates, metrics, bar
        self._waiting: tuple[int, Any, int] | None = None
        self._since: float | None = None
        self._recent: list[float] = []

    def begin(self) -> None:
        """Goes on measuring time."""
        self._since = time.perf_counter() if self._since is None else self._since

    def step(self, step: int, loss: jax.Array, tokens: int) -> None:
        """Takes note of a step that was begun."""
        self._fetch()
        self._waiting = (step, loss, tokens)

    def flush(self) -> None:
        """Waits for the last step."""
        self._fetch()
        self._since = None

    def report(self, step: int, held: float | None) -> None:
        """Says how things stand: the losses since the last report, and that of an evaluation."""
        said = [f'step {step}']
        if self._recent:
            said += [f'loss {np.mean(self._recent):.4f}']
        if held is not None:
            self._metrics.add(step, {'evaluation_loss': held, 'seconds': self.seconds})
            said += [f'evaluation {held:.4f}']
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
        rate = float(self._rates[step - 1])
        if not np.isfinite(value):
            raise ValueError(
                f'the loss must stay finite; it is {value} at step {step}. Lower the learning rate '
                f'(now {self._rates.max():g})'
            )
        self.tokens += tokens
        self._recent.append(value)
        self._metrics.add(
            step,
            {'loss': value, 'rate': rate, 'tokens': self.tokens, 'seconds': self.seconds},
        )
        speed = f'{self.tokens / self.seconds:,.0f}'
        self._bar.set_postfix({'loss': f'{value:.4f}', 'tokens/s': speed}, refresh=False)
        self._bar.update()
