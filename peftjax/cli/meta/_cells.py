"""The results of `peftjax meta`, one by one: a method on tasks of one shape."""

import argparse
import pathlib
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from peftjax import Peft, data
from peftjax.cli.meta import _frozen, _learn, _record
from peftjax.cli.meta._adapt import Adapting
from peftjax.cli.meta._frozen import Features
from peftjax.cli.meta._ground import Ground, Shape
from peftjax.cli.meta._learn import Meta
from peftjax.cli.meta._methods import WAYS, Rates, Way
from peftjax.cli.meta._parts import Parts
from peftjax.cli.meta._space import Space, attached

VALID, TEST = 1, 2
"""What is added to the seed for episodes of validation and of the test."""


class Still(NamedTuple):
    """Features that no task changes, and what they took.

    Attributes:
      features: `(texts, width)`.
      compile_seconds: of their program.
      peak_bytes: of it.
    """

    features: jax.Array
    compile_seconds: float
    peak_bytes: int


class Cells:
    """Results one by one; episodes are those of their shape, the same for all methods."""

    def __init__(
        self,
        ground: Ground,
        options: argparse.Namespace,
        adapters: pathlib.Path,
        parts: Parts,
        learned_on: Shape,
    ):
        """Computes nothing yet.

        Args:
          ground: encoder and texts.
          options: as parsed.
          adapters: the folder of what is learned.
          parts: of a result that is not whole.
          learned_on: the tasks that phi is meta-trained on.
        """
        self._ground, self._options, self._adapters = ground, options, adapters
        self._parts, self._learned_on = parts, learned_on
        self._made: dict[tuple[str, str, Shape], Adapting] = {}
        self._looks: dict[str, Features] = {}
        self._features: dict[str, Still] = {}
        self._recipes: dict[str, tuple[Peft, Any, Any]] = {}
        self._sharp: dict[Shape, float] = {}

    def record(self, way: Way, shape: Shape) -> tuple[dict[str, Any], np.ndarray]:
        """One method on tasks of one shape, and its accuracies `(tasks, steps)`."""
        valid, test = self._drawn('valid', shape), self._drawn('test', shape)
        sharp = self._sharpness(shape)
        said = {'method': way.name, 'about': way.about, **shape._asdict()}
        said |= {'episodes': self._options.episodes, 'sharpness': sharp}
        said |= {'head_parameters': shape.ways * (self._ground.features.shape[1] + 1)}
        phi, meta = self._start(way)
        said |= {'phi_parameters': _learn.sizes(phi), 'meta': meta}
        if way.still:
            more, found = self._classified(way, phi, shape, valid, test)
        else:
            more, found = self._adapted(way, shape, phi, valid, test, sharp)
        said |= {'accuracy': _record.means(found), 'interval': _record.interval(found)}
        return said | more, found

    def _sharpness(self, shape: Shape) -> float:
        if self._options.sharpness is not None:
            return self._options.sharpness
        if shape not in self._sharp:
            valid = self._drawn('valid', shape)
            self._sharp[shape] = _frozen.sharpness(self._ground.features, valid, shape.ways)
        return self._sharp[shape]

    def _recipe(self, way: Way) -> tuple[Peft, Any, Any]:
        """A recipe's plan, the encoder with it, and a phi that nothing has trained."""
        if way.recipe not in self._recipes:
            peft, forward = attached(self._ground, way.method())
            key, params = jax.random.key(self._options.seed), self._ground.theta['params']
            self._recipes[way.recipe] = peft, forward, jax.jit(peft.init)(key, params)
        return self._recipes[way.recipe]

    def _space(self, way: Way, shape: Shape) -> Space:
        return Space(*self._recipe(way)[:2], shape.ways)

    def _drawn(self, name: Literal['valid', 'test'], shape: Shape) -> data.Episode:
        options, part = self._options, self._ground.parts[name]
        count = {'valid': options.valid_episodes, 'test': options.episodes}[name]
        seed = options.seed + {'valid': VALID, 'test': TEST}[name]
        return part.drawn(shape, queries=options.queries, tasks=count, seed=seed)

    def _adapting(self, way: Way, shape: Shape) -> Adapting:
        """What all methods share that adapt the same kind of phi by the same optimizer."""
        key = (way.recipe, way.fit, shape)
        if key not in self._made:
            most = max(*self._options.steps, self._options.inner_steps)
            space = self._space(way, shape)
            validated = self._options.valid_episodes * len(way.grid())
            counts = (validated, self._options.episodes)
            self._made[key] = Adapting(self._ground.theta, space, way, most, counts)
        return self._made[key]

    def _classified(
        self, way: Way, phi: Any, shape: Shape, valid: data.Episode, test: data.Episode
    ) -> tuple[dict[str, Any], np.ndarray]:
        """A classifier on features that no task changes: no steps, one accuracy."""
        still, took, strengths = self._still(way, phi), None, {}
        if way.fit == 'prototypes':
            found = np.asarray(_frozen.nearest(still.features, test, shape.ways))
        else:
            fit = lambda episodes, strength: _frozen.logistic(
                still.features, episodes, shape.ways, strength
            )
            strengths = {s: float(fit(valid, s)[0].mean()) for s in _frozen.STRENGTHS}
            found, took = fit(test, max(strengths, key=lambda s: strengths[s]))
        said = {
            'steps': [0],
            'rates': None,
            'validation': [{'strength': s, 'accuracy': [a]} for s, a in strengths.items()],
            'milliseconds': took,
            'compile_seconds': still.compile_seconds,
            'peak_bytes': still.peak_bytes,
        }
        return said, found[:, None]

    def _still(self, way: Way, phi: Any) -> Still:
        """Features of all texts to validate and to test on, with a learned phi or with none."""
        name = way.learner or ''
        if not name:
            return Still(self._ground.features, 0.0, self._ground.features.nbytes)
        if name not in self._features:
            looks = self._looking(way)
            compiled = looks.programs.seconds
            features = looks.of(phi, np.arange(self._ground.parts['train'].first))
            seconds = looks.programs.seconds - compiled
            self._features[name] = Still(features, seconds, looks.programs.peak_bytes)
        return self._features[name]

    def _looking(self, way: Way) -> Features:
        if way.recipe not in self._looks:
            space = self._space(way, self._learned_on)  # how many ways a task has is no matter
            self._looks[way.recipe] = Features(self._ground.theta, space)
        return self._looks[way.recipe]

    def _start(self, way: Way) -> tuple[Any, dict[str, Any] | None]:
        """The phi that tasks begin with, and how it was learned."""
        fresh = self._recipe(way)[2] if way.recipe else {}
        if way.learner is None:
            return fresh, None
        own, inner = self._learned_on, WAYS[way.learner]
        meta = Meta(
            self._ground,
            inner,
            self._space(inner, own),
            own,
            self._looking(inner) if inner.still else self._adapting(inner, own),
            self._drawn('valid', own),
            self._sharpness(own),
            self._options,
            fresh,
        )
        return _learn.learned(meta, self._adapters)

    def _adapted(
        self,
        way: Way,
        shape: Shape,
        phi: Any,
        valid: data.Episode,
        test: data.Episode,
        sharp: float,
    ) -> tuple[dict[str, Any], np.ndarray]:
        """Accuracy after each number of steps, at the rates that validation found best for it."""
        adapting = self._adapting(way, shape)
        compiled = adapting.programs.seconds
        asked, grid = self._options.steps, way.grid()
        of = f'{way.name}, {shape.ways} ways, {shape.shots} shots'
        kept = {'parts': self._parts, 'name': f'{of}, valid'}
        table = adapting.accuracies(phi, grid, valid, sharp, asked, **kept).mean(1)
        best = table.argmax(0)
        found = np.empty((len(test.support.labels), len(asked)), np.float32)
        for i in sorted(set(best.tolist())):
            columns = np.flatnonzero(best == i)
            steps = [asked[c] for c in columns]
            kept['name'] = f'{of}, test, rates {i}'
            found[:, columns] = adapting.accuracies(phi, [grid[i]], test, sharp, steps, **kept)[0]
        rates = [None if step == 0 else list(grid[i]) for step, i in zip(asked, best, strict=True)]
        said = {
            'steps': list(asked),
            'rates': rates,
            'validation': _validation(grid, table),
            'milliseconds': adapting.milliseconds(phi, grid[0], test, sharp),
            'compile_seconds': adapting.programs.seconds - compiled,
            'peak_bytes': adapting.programs.peak_bytes,
        }
        return said, found


def _validation(grid: tuple[Rates, ...], table: np.ndarray) -> list[dict[str, Any]]:
    """What validation found, so that rates at the edge of the grid are seen."""
    return [
        {'rates': list(rates), 'accuracy': [round(float(one), 3) for one in row]}
        for rates, row in zip(grid, table, strict=True)
    ]
