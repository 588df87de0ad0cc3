"""Trains one method on a language model's rows."""

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peftjax as pj
from peftjax import data
from peftjax.cli import _mesh
from peftjax.cli._accumulate import cut
from peftjax.cli._loop import Drawn, Evaluation, Saving, train
from peftjax.cli._programs import Programs
from peftjax.cli._watch import Watch
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
      embeddings: whether the token embedding and the head are kept so too.
      clip: the most that the norm of all gradients may be.
      accumulate: in how many parts, one after the other, a step computes its rows.
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
    embeddings: bool = False
    clip: float = 1.0
    accumulate: int = 1


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
        self._step = Programs(pj.train_step(loss, self._tx, accumulate=settings.accumulate))
        self._loss = Programs(jax.jit(lambda params, phi, batch: loss(params, phi, batch)))

    def start(self, seed: int) -> pj.TrainState:
        """A fresh state."""
        for_phi, for_steps = jax.random.split(jax.random.key(seed))
        where = self.peft.shardings(self.task.params)
        phi = jax.jit(self.peft.init, out_shardings=where)(for_phi, self.task.params)
        return pj.start(self._tx, phi, for_steps)

    def batches(self, rows: data.Rows, seed: int) -> data.Batches:
        """At least as many batches as there are steps."""
        size, steps = self.settings.batch, self.settings.steps
        per_epoch = -(-len(rows) // size)
        return data.Batches(rows, size, seed=seed, epochs=-(-steps // per_epoch))

    def fit(
        self,
        split: Any,
        state: pj.TrainState,
        batches: data.Batches,
        evaluations: int,
        watch: Watch,
        saving: Saving | None = None,
    ) -> Fitted:
        """Trains.

        Args:
          split: rows to `train` on, and those `held` for evaluation, or None.
          state: to begin with.
          batches: those that follow.
          evaluations: how many there shall be after the one before the first step.
          watch: what measures and shows.
          saving: where states are kept.

        Returns:
          What was found, and what it took.

        Raises:
          ValueError: the loss does not stay finite.
          Terminated: the process was told to end.
        """
        task, held = self.task, split.held
        some = split.train.batch([0], self.settings.batch)
        self._step.prepare(task.params, state, self._taken(some)[0])
        evaluation = Evaluation(None if held is None else partial(self.evaluate, held), evaluations)
        if not int(state.step):
            evaluation.report(0, state.phi, watch)
        drawn, steps = Drawn(batches, self._taken, watch), self.settings.steps
        last = lambda phi: self._mean([some], phi)
        state = train(self._step, task.params, state, drawn, steps, watch, last, evaluation, saving)
        return Fitted(state.phi, watch.seconds, watch.tokens, self._step.peak_bytes)

    def _taken(self, batch: data.LanguageBatch) -> tuple[dict[str, Any], int]:
        """A batch as the step takes it, and its tokens without padding."""
        tokens = int((batch.segment_ids > 0).sum())
        parts = self.settings.accumulate
        return _mesh.dealt(cut(arguments(batch), parts), self.task.mesh, parts), tokens

    def evaluate(self, rows: data.Rows, phi: Any) -> dict[str, float]:
        """The mean loss of all tokens to learn."""
        return {
            'evaluation_loss': self._mean(data.Batches(rows, self.settings.batch, seed=None), phi)
        }

    def _mean(self, batches: Iterable[data.LanguageBatch], phi: Any) -> float:
        """The mean loss of all tokens to learn in some batches."""
        parts = [self._loss(self.task.params, phi, arguments(batch)) for batch in batches]
        total, count = (float(sum(map(float, column))) for column in zip(*parts, strict=True))
        return total / count
