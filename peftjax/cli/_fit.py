"""Fits one method to the examples of one seed, and measures what it took."""

import dataclasses
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peftjax import Peft, TrainState, attach, chain_optimizer, data, start, train_step
from peftjax.cli import _mesh
from peftjax.cli._accumulate import cut
from peftjax.cli._listed import Listed
from peftjax.cli._loop import Drawn, Evaluation, Saving, train
from peftjax.cli._probe import fit_probe
from peftjax.cli._programs import Programs
from peftjax.cli._recipes import Recipe
from peftjax.cli._task import EVALUATE, Task, call, cross_entropy
from peftjax.cli._watch import Watch
from peftjax.losses import Loss


@dataclasses.dataclass(frozen=True)
class Settings:
    """How phi is trained.

    Attributes:
      epochs: passes over the examples.
      batch: rows of a step.
      rate: of the method; `None` for the recipe's own.
      head_rate: of the classifier; `None` for the recipe's own.
      weight_decay: on all that is trained.
      warmup: the part of the steps over which the rate rises; then it falls to zero.
      clip: the most that the norm of all gradients may be.
      accumulate: in how many parts, one after the other, a step computes its rows.
    """

    epochs: int
    batch: int
    rate: float | None = None
    head_rate: float | None = None
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    accumulate: int = 1

    def of(self, recipe: Recipe) -> 'Settings':
        """These settings with the recipe's rates where none are given."""
        rate = recipe.rate if self.rate is None else self.rate
        head_rate = recipe.head_rate if self.head_rate is None else self.head_rate
        return dataclasses.replace(self, rate=rate, head_rate=head_rate)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What a fit gives.

    Attributes:
      peft: the plan.
      phi: the trained parameters.
      seconds: of training, without compilation.
      compile_seconds: of compilation.
      steps: updates made.
      peak_bytes: arguments and temporaries of the largest compiled step.
    """

    peft: Peft
    phi: Any
    seconds: float
    compile_seconds: float
    steps: int
    peak_bytes: int


class Fitter:
    """Fits one recipe to one task; what is compiled serves all seeds."""

    def __init__(self, task: Task, recipe: Recipe, settings: Settings, length: int, steps: int):
        shape = jax.ShapeDtypeStruct((settings.batch, length), jnp.int32)
        masks = {'attention_mask': shape, 'pool_mask': shape, 'deterministic': True}
        self.task, self.recipe, self.steps = task, recipe, steps
        self.settings = settings.of(recipe)
        self.peft = attach(recipe.method(), task.apply, task.params, shape, **masks)
        self.forward = self.peft.wrap(task.apply)
        self._tx = optimizer(self.settings, steps, [keys[0] for keys, _ in self.peft.method.parts])
        rates = schedule(self.settings, self.settings.rate or self.settings.head_rate or 0.0, steps)
        self.rates = np.asarray(jax.vmap(rates)(jnp.arange(steps)))
        step = train_step(self._loss, self._tx, accumulate=settings.accumulate)
        self._step = Programs(step)
        self._predict = jax.jit(lambda p, phi, batch: call(task, self.forward, batch, None, p, phi))

    def _loss(self, params: Any, phi: Any, batch: dict, key: jax.Array) -> Loss:
        return cross_entropy(call(self.task, self.forward, batch, key, params, phi), batch)

    def start(self, seed: int) -> TrainState:
        """A fresh state; the seed draws dropout, the classifier and the rest of phi."""
        for_phi, for_head, for_steps = jax.random.split(jax.random.key(seed), 3)
        params = self.task.fresh(for_head)
        phi = jax.jit(self.peft.init, out_shardings=self.peft.shardings(params))(for_phi, params)
        return start(self._tx, phi, for_steps)

    def batches(self, tokens: data.Tokens, labels: np.ndarray, seed: int) -> Listed:
        """Those of all epochs; the seed draws the order of each."""
        size, parts = self.settings.batch, self.settings.accumulate
        order = data.epochs(len(labels), size, seed, self.settings.epochs)
        whole = (self.task.batch(tokens, labels, index, size) for index in order)
        return Listed([cut(batch, parts) for batch in whole])

    def fit(
        self,
        examples: tuple[data.Tokens, np.ndarray],
        state: TrainState,
        batches: Listed,
        watch: Watch,
        evaluation: Evaluation | None = None,
        saving: Saving | None = None,
    ) -> Fitted:
        """Trains on all examples given.

        Args:
          examples: their tokens, and `(n,)` integer labels.
          state: to begin with.
          batches: of the examples, those that follow.
          watch: what measures and shows.
          evaluation: what happens before the first step and between steps.
          saving: where states are kept.

        Returns:
          What was found, and what it took.

        Raises:
          ValueError: the loss does not stay finite.
          Terminated: the process was told to end.
        """
        if self.recipe.probe:
            return self._probe(*examples, state.phi, watch, evaluation)
        params, steps = self.task.params, len(batches)
        compiled = self._step.seconds
        for batch in batches.all:
            self._step.prepare(params, state, self._taken(batch)[0])
        compiled = self._step.seconds - compiled
        if evaluation is not None and not int(state.step):
            evaluation.report(0, state.phi, watch)
        drawn = Drawn(batches, self._taken, watch)
        last = partial(self._loss_of_some, *examples)
        state = train(self._step, params, state, drawn, steps, watch, last, evaluation, saving)
        return Fitted(self.peft, state.phi, watch.seconds, compiled, steps, self._step.peak_bytes)

    def _loss_of_some(self, tokens: data.Tokens, labels: np.ndarray, phi: Any) -> float:
        """The mean loss of as many examples as are evaluated at once."""
        some = data.Tokens(tokens.input_ids[:EVALUATE], tokens.attention_mask[:EVALUATE])
        return self.evaluate(some, labels[:EVALUATE], phi)['evaluation_loss']

    def _taken(self, batch: dict) -> tuple[dict, int]:
        """A batch as the step takes it, and its tokens without padding."""
        dealt = _mesh.dealt(batch, self.task.mesh, self.settings.accumulate)
        return dealt, int(batch['mask'].sum())

    def _probe(
        self,
        tokens: data.Tokens,
        labels: np.ndarray,
        phi: Any,
        watch: Watch,
        evaluation: Evaluation | None,
    ) -> Fitted:
        began = time.perf_counter()
        head, peak = fit_probe(self.task, tokens, labels)
        values = {f'classifier/{name}': {'value': value} for name, value in head.items()}
        seconds = time.perf_counter() - began
        phi = {**phi, 'head': values}
        watch.tick()
        if evaluation is not None:
            evaluation.report(0, phi, watch)
        return Fitted(self.peft, phi, seconds, 0.0, 0, peak)

    def logits(self, phi: Any, tokens: data.Tokens) -> np.ndarray:
        """Logits of all examples, `(n, labels)`."""
        return self.task.each(lambda batch: self._predict(self.task.params, phi, batch), tokens)

    def accuracy(self, phi: Any, tokens: data.Tokens, labels: np.ndarray) -> float:
        """The part of the examples that gets the right label, in percent."""
        return _accuracy(self.logits(phi, tokens), labels)

    def evaluate(self, tokens: data.Tokens, labels: np.ndarray, phi: Any) -> dict[str, float]:
        """Mean loss and accuracy in percent."""
        logits = self.logits(phi, tokens)
        losses = optax.softmax_cross_entropy_with_integer_labels(jnp.float32(logits), labels)
        return {
            'evaluation_loss': float(losses.mean()),
            'evaluation_accuracy': _accuracy(logits, labels),
        }


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return 100 * float((logits.argmax(-1) == labels).mean())


def step_count(examples: int, settings: Settings) -> int:
    """How many updates a fit makes."""
    return settings.epochs * -(-examples // settings.batch)


def schedule(settings: Settings, rate: float, steps: int) -> optax.Schedule:
    """The learning rate at each step: it rises from zero, then falls to zero.

    Few steps have no rise: the first of them would be made at a rate of zero.
    """
    rise = round(settings.warmup * steps)
    fall = optax.linear_schedule(rate, 0.0, max(1, steps - rise))
    if rise == 0:
        return fall
    return optax.join_schedules([optax.linear_schedule(0.0, rate, rise), fall], [rise])


def optimizer(settings: Settings, steps: int, names: Iterable[str]) -> optax.GradientTransformation:
    """AdamW with a rate for the head and one for the method, both rising, then falling."""

    def adamw(rate: float) -> optax.GradientTransformation:
        rates = schedule(settings, rate, steps)
        return optax.adamw(rates, weight_decay=settings.weight_decay)

    assert settings.rate is not None and settings.head_rate is not None
    rates = {'body': settings.rate, 'head': settings.head_rate}
    each = chain_optimizer({name: adamw(rates[name]) for name in dict.fromkeys(names)})
    return optax.chain(optax.clip_by_global_norm(settings.clip), each)
