"""The settings of the papers on Omniglot, and the algorithms with them.

MAML: Finn et al., 2017, arXiv:1703.03400, appendix A.1; queries, outer rate and first-order MAML as
in the authors' code (github.com/cbfinn/maml). First-order MAML and Reptile: Nichol et al., 2018,
arXiv:1803.02999, table 2 and appendix A. ANIL: Raghu et al., 2020, arXiv:1909.09157, table 2 and
appendix, which has 20 ways alone; 5 ways are trained as MAML is. Prototypical networks: Snell et
al., 2017, arXiv:1703.05175, section 3.1.

What differs from them: alphabets are held back (`omniglot_data.py`). The second moments of
Reptile's inner Adam are the mean over the tasks of an outer step, where the authors' code hands
them on from task to task; its parts of a support are drawn anew each step, where theirs are an
epoch. Prototypes have the norm of their episode at test too, where theirs has running averages.
"""

import dataclasses
from typing import Any

import jax
import optax

import peftjax as pj

ALGORITHMS = ('maml', 'fomaml', 'reptile', 'anil', 'prototypes')
PUBLISHED = {
    ('maml', 5, 1): 98.7, ('maml', 20, 1): 95.8, ('maml', 5, 5): 99.9, ('maml', 20, 5): 98.9,
    ('fomaml', 5, 1): 98.3, ('fomaml', 20, 1): 89.4, ('fomaml', 5, 5): 99.2,
    ('fomaml', 20, 5): 97.9, ('reptile', 5, 1): 97.68, ('reptile', 20, 1): 89.43,
    ('reptile', 5, 5): 99.48, ('reptile', 20, 5): 97.12, ('anil', 20, 1): 96.2,
    ('anil', 20, 5): 98.0, ('prototypes', 5, 1): 98.8, ('prototypes', 20, 1): 96.0,
    ('prototypes', 5, 5): 99.7, ('prototypes', 20, 5): 98.9,
}  # fmt: skip
"""Percent, with transduction where a paper has both, on the papers' own splits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    """The inner loop.

    Attributes:
      rate: of SGD, or of Reptile's Adam.
      steps: while training.
      test_steps: on a new task.
      batch: how many rows of a support a step draws; None: all.
      test_batch: the same on a new task.
    """

    rate: float
    steps: int
    test_steps: int
    batch: int | None = None
    test_batch: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an algorithm is trained for tasks of so many ways and shots, and judged on them.

    Attributes:
      algorithm: one of `ALGORITHMS`.
      judged: ways, shots and queries of the tasks that it is judged on.
      trained: the same of the tasks that it is trained on.
      tasks: of an outer step.
      steps: outer steps, as published; prototypes, which were stopped by validation, have 20,000.
      inner: the inner loop; None for prototypes.
    """

    algorithm: str
    judged: tuple[int, int, int]
    trained: tuple[int, int, int]
    tasks: int
    steps: int
    inner: Inner | None

    @property
    def published(self) -> float | None:
        """The published accuracy, percent."""
        return PUBLISHED.get((self.algorithm, *self.judged[:2]))


def recipe(algorithm: str, ways: int, shots: int) -> Recipe:
    """That of the paper."""
    own, few = (ways, shots, shots), ways == 5
    if algorithm == 'prototypes':
        made = dict(judged=(ways, shots, 15), trained=(60, shots, 5), tasks=1, steps=20_000)
        return Recipe(algorithm=algorithm, inner=None, **made)  # type: ignore
    if algorithm == 'reptile':
        batches = dict(batch=10, test_batch=5) if few else dict(batch=20, test_batch=10)
        steps, rate = (5, 1e-3) if few else (10, 5e-4)
        inner = Inner(rate=rate, steps=steps, test_steps=50, **batches)
        made = dict(judged=(ways, shots, 1), trained=(ways, 10, 1), tasks=5)
        many = 100_000 if few else 200_000
        return Recipe(algorithm=algorithm, inner=inner, steps=many, **made)  # type: ignore
    rate, steps, test_steps = (0.4, 1, 3) if few else (0.1, 5, 5)
    inner = Inner(rate=rate, steps=steps, test_steps=test_steps)
    tasks = 32 if few else 16
    made = dict(judged=own, trained=own, tasks=tasks, steps=60_000, inner=inner)
    return Recipe(algorithm=algorithm, **made)  # type: ignore


def outer(recipe: Recipe, steps: int) -> optax.GradientTransformation:
    """The outer optimizer of a run of so many steps."""
    if recipe.algorithm == 'reptile':
        # its gradient is the way back to where a task ended; a rate of 1 goes all of it
        rate = optax.linear_schedule(1.0, 0.0, steps)
        return pj.chain_optimizer({'phi': optax.sgd(rate), 'inner': optax.sgd(1.0)})
    if recipe.algorithm == 'prototypes':
        return optax.adam(optax.exponential_decay(1e-3, 2000, 0.5, staircase=True))
    return optax.adam(1e-3)


def inner_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """The inner optimizer."""
    assert recipe.inner is not None
    if recipe.algorithm == 'reptile':
        return optax.adam(recipe.inner.rate, b1=0.0)
    return optax.sgd(recipe.inner.rate)


def drawn(batch: Any, rows: int | None, key: jax.Array) -> Any:
    """Some rows of a batch, or all where they are not more."""
    count = batch.labels.shape[0]
    if rows is None or rows >= count:
        return batch
    index = jax.random.choice(key, count, (rows,), replace=False)
    return jax.tree.map(lambda leaf: leaf[index], batch)
