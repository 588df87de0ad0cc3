"""Meta-trains a phi; a training that is cut off goes on from its last checkpoint."""

import argparse
import pathlib
import shutil
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peftjax as pj
from peftjax import checkpoint, data
from peftjax.cli import _saved
from peftjax.cli._programs import Programs
from peftjax.cli.meta._adapt import Adapting, descent
from peftjax.cli.meta._frozen import Features
from peftjax.cli.meta._ground import Ground, Shape
from peftjax.cli.meta._methods import INNER, Rates, Way
from peftjax.cli.meta._space import Space

CLIP = 1.0
"""The most that the norm of a gradient over tasks may be."""

EVALUATIONS = 10
"""How often phi is judged on validation episodes; the best one is kept."""

WAYS = 20
"""Labels of a task of meta-training, where there are so many. The more there are, the more each
text is told apart from, and what is learned serves tasks of fewer."""


class Meta(NamedTuple):
    """A phi to learn.

    Attributes:
      ground: encoder and texts.
      way: by which learner.
      space: the method.
      shape: of the tasks that it is meta-trained on.
      adapting: judges on validation episodes of that shape; of a way that makes no steps,
        prototypes do.
      valid: those episodes.
      sharpness: of the heads that tasks begin with.
      options: as parsed.
      fresh: phi to begin with.
    """

    ground: Ground
    way: Way
    space: Space
    shape: Shape
    adapting: Adapting | Features
    valid: data.Episode
    sharpness: float
    options: argparse.Namespace
    fresh: Any

    @property
    def name(self) -> str:
        """Of the folder of what is learned."""
        return f'{self.way.learner}-{self.shape.ways}way-{self.shape.shots}shot'

    def judge(self, phi: Any, rates: Sequence[Rates]) -> np.ndarray:
        """Mean accuracies `(rates,)` on validation episodes where the inner loop ends."""
        if isinstance(self.adapting, Features):
            return self.adapting.accuracies(phi, self.valid, self.shape.ways).mean(keepdims=True)
        steps = (self.options.inner_steps,)
        found = self.adapting.accuracies(phi, rates, self.valid, self.sharpness, steps)
        return found.mean((1, 2))


def shape(options: argparse.Namespace, labels: Sequence[np.ndarray]) -> Shape:
    """The tasks that phi is meta-trained on.

    Args:
      options: as parsed.
      labels: of the files to train and to validate on.
    """
    most = min(len(np.unique(own)) for own in labels)
    return Shape(options.meta_ways or min(WAYS, most), options.meta_shots)


def learned(meta: Meta, folder: pathlib.Path) -> tuple[Any, dict[str, Any]]:
    """What is learned: found where an earlier run left it, or trained and left there.

    Args:
      meta: what to learn.
      folder: of adapters.

    Returns:
      Phi, and what is known of its training.
    """
    place = folder / meta.name
    if (place / checkpoint.ADAPTER).is_file():
        found = checkpoint.load(place)
        found.check(meta.ground.theta['params'])
        return found.phi, found.metadata['meta']
    states = place.with_name(f'{meta.name}.states')
    phi, about = _trained(meta, states)
    metadata = {
        'task': 'few-shot',
        'model': _saved.lasting(meta.ground.model),
        'max_tokens': meta.ground.max_tokens,
        'method': meta.way.learner,
        'meta': about,
    }
    params = meta.ground.theta['params']
    checkpoint.save(place, meta.space.peft, phi, params=params, metadata=metadata)
    shutil.rmtree(states, ignore_errors=True)
    return phi, about


def _trained(meta: Meta, states: pathlib.Path) -> tuple[Any, dict[str, Any]]:
    options = meta.options
    theta = meta.ground.theta | {'sharpness': np.float32(meta.sharpness)}
    rates = _inner_rates(meta)
    tx = optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(options.meta_rate))
    step = Programs(pj.train_step(loss(meta, rates), tx))
    own = jax.tree.map(jnp.copy, meta.fresh)  # donated; others begin with it too
    start = pj.start(tx, own, jax.random.key(options.seed), keep_best=True)
    tasks, clock = episodes(meta), Clock(lambda phi: float(meta.judge(phi, [rates])[0]))
    every = max(1, options.meta_steps // EVALUATIONS)
    keep = pj.Every(every, pj.KeepBest(clock.judge, maximize=True))
    settings = {'rates': list(rates), 'tasks': options.meta_tasks, 'rate': options.meta_rate}
    with pj.Checkpoints(states, meta.space.peft, theta['params'], settings=settings) as saved:
        state = saved.resume(start, tasks)
        done = int(state.step)
        if done < options.meta_steps:
            step.prepare(theta, state, _first(tasks))
        with clock:
            state = pj.fit(
                step, theta, state, tasks, steps=options.meta_steps, events=[keep],
                checkpoints=saved, save_every=every,
            )  # fmt: skip
    assert state.best is not None
    about = {
        'learner': meta.way.learner,
        **meta.shape._asdict(),
        'sharpness': meta.sharpness,
        'inner_rates': None if meta.way.still else list(rates),
        'steps': options.meta_steps,
        'tasks_a_step': options.meta_tasks,
        'best_step': int(state.best.step),
        'validation_accuracy': float(state.best.value),
        'seconds': clock.seconds * options.meta_steps / max(1, options.meta_steps - done),
        'compile_seconds': step.seconds,
        'peak_bytes': step.peak_bytes,
    }
    return state.best.phi, about


class Clock:
    """The seconds of training, without those of judging.

    Attributes:
      seconds: so far.
    """

    def __init__(self, judge: Any):
        self._judge, self._began, self.seconds = judge, 0.0, 0.0

    def judge(self, step: int, phi: Any) -> float:
        """What is judged, while the clock stands."""
        jax.block_until_ready(phi)
        began = time.perf_counter()
        found = self._judge(phi)
        self._began += time.perf_counter() - began
        return found

    def __enter__(self) -> 'Clock':
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began


def _inner_rates(meta: Meta) -> Rates:
    """The rates of the inner loop: those that do best for a fresh phi on validation episodes."""
    if meta.way.still:
        return meta.way.grid()[0]  # there is no inner loop
    return INNER[int(meta.judge(meta.fresh, INNER).argmax())]


def loss(meta: Meta, rates: Rates) -> Any:
    """The loss over tasks."""
    space, steps = meta.space, meta.options.inner_steps
    match meta.way.learner:
        case 'maml' | 'fomaml':
            first = meta.way.learner == 'fomaml'
            return pj.meta.maml(
                space.loss, descent(rates), steps=steps, first_order=first, begin=space.begin
            ).loss
        case 'reptile':
            return pj.meta.reptile(space.loss, descent(rates), steps=steps, begin=space.begin).loss
        case _:
            return pj.meta.prototypical(space.embed, ways=space.ways, scale=meta.sharpness).loss


def episodes(meta: Meta) -> data.Episodes:
    """Tasks to train on."""
    task, queries = drawn(meta.way, meta.shape, meta.options.meta_queries)
    options, part = meta.options, meta.ground.parts['train']
    return part.episodes(
        **task._asdict(), queries=queries, tasks=options.meta_tasks, seed=options.seed
    )


def drawn(way: Way, shape: Shape, queries: int) -> tuple[Shape, int]:
    """A task to train on, and the queries of each of its labels.

    Reptile looks at supports alone: its supports have the queries too, and one more is none.
    """
    if way.learner != 'reptile':
        return shape, queries
    return shape._replace(shots=shape.shots + queries), 1


def check(way: Way, shape: Shape, options: argparse.Namespace) -> None:
    """Refuses tasks that a learner cannot learn from.

    Raises:
      ValueError: they are of one label, or Reptile makes one step on each.
    """
    if shape.ways < 2:
        raise ValueError(
            '--meta-ways must be 2 or more, and so must be the labels in --train and --valid: '
            f'nothing is learned from tasks of {shape.ways} label'
        )
    if way.learner == 'reptile' and options.inner_steps < 2:
        raise ValueError(
            '--inner-steps must be 2 or more for reptile, got 1: after one step, its gradient is '
            'that of training on all tasks together. Raise it, or leave reptile out of --methods'
        )


def _first(tasks: data.Episodes) -> data.Episode:
    """A batch of the shape of those that follow; none of them is taken."""
    where = tasks.state()
    one = next(tasks)
    tasks.restore(where)
    return one


def sizes(phi: Any) -> int:
    """The numbers of a phi."""
    return int(np.sum([leaf.size for leaf in jax.tree.leaves(phi)]))
