"""The ways of learning a few-shot task that `peftjax meta` knows."""

import dataclasses
import itertools
from typing import Literal, NamedTuple

from peftjax import Method, Trainable
from peftjax.cli._recipes import RECIPES

Learner = Literal['maml', 'fomaml', 'reptile', 'prototypical']
Fit = Literal['prototypes', 'logistic', 'descent', 'adam']


class Rates(NamedTuple):
    """Learning rates of an adaptation."""

    body: float
    head: float


@dataclasses.dataclass(frozen=True)
class Way:
    """One way of learning a task.

    Attributes:
      name: on the command line.
      about: one line of help.
      fit: what is done on a task: prototypes or logistic regression on features that stay as they
        are; phi and head adapted by plain gradient descent, the inner loop's, or by Adam.
      recipe: of `peftjax compare`, what phi is; empty where there is none.
      learner: what phi was meta-learned by; None for a fresh one.
    """

    name: str
    about: str
    fit: Fit
    recipe: str = ''
    learner: Learner | None = None

    @property
    def still(self) -> bool:
        """Whether no steps are made on a task."""
        return self.fit in ('prototypes', 'logistic')

    def method(self) -> Method:
        """What phi is of."""
        if self.recipe == 'full':
            return Trainable(target='.')  # here the encoder has no head of its own
        build = RECIPES[self.recipe].build
        assert build is not None
        return build()

    def grid(self) -> tuple[Rates, ...]:
        """The rates that validation chooses among."""
        body, of_head = GRIDS[self.recipe] if self.fit == 'adam' else DESCENT
        return tuple(itertools.starmap(Rates, itertools.product(body, of_head)))


LEARNED = 'lora'
"""What is meta-learned."""

ADAM_HEAD = (3e-3, 3e-2)
GRIDS = {
    'full': ((3e-5, 1e-4, 3e-4), ADAM_HEAD),
    'lora': ((3e-4, 1e-3, 3e-3, 1e-2), ADAM_HEAD),
    'adapter': ((3e-4, 1e-3, 3e-3, 1e-2), ADAM_HEAD),
    'prefix': ((1e-2, 3e-2, 1e-1), ADAM_HEAD),
}
"""Rates of Adam by recipe, of the method and of the head."""

DESCENT = ((0.3, 1.0, 3.0, 10.0), (10.0,))
"""Rates of plain gradient descent from a learned phi; the head, which begins as prototypes, hardly
needs one of its own."""

INNER = (Rates(0.3, 10.0), Rates(1.0, 10.0))
"""Rates of the inner loop while phi is learned. A fresh phi, half of which is zero and its
gradients small, can do with larger ones; what is learned from there cannot."""

_LEARNERS: dict[Learner, str] = {
    'maml': 'MAML',
    'fomaml': 'MAML without second derivatives',
    'reptile': 'Reptile',
    'prototypical': 'prototypical training',
}
_FITS: dict[Learner, Fit] = {'prototypical': 'prototypes'}  # the others learn for steps

_FRESH = {name: f'{RECIPES[name].about}, from a fresh start' for name in GRIDS}


def _from_learned(ending: str, about: str, fit: Fit) -> list[Way]:
    """What else can be done with each learned phi."""
    return [
        Way(f'{name}-{ending}', f'{about} ({what})', fit, LEARNED, name)
        for name, what in _LEARNERS.items()
    ]


WAYS = {
    way.name: way
    for way in (
        Way('nearest', 'nearest prototype, encoder frozen', 'prototypes'),
        Way('logistic', 'logistic regression, encoder frozen', 'logistic'),
        *(Way(name, about, 'adam', name) for name, about in _FRESH.items()),
        *(Way(name, f'LoRA that {about} learned', _FITS.get(name, 'descent'), LEARNED, name)
          for name, about in _LEARNERS.items()),
        *_from_learned('tuned', 'the same, then tuned as fresh LoRA is', 'adam'),
        *_from_learned('logistic', 'the same, frozen; logistic regression', 'logistic'),
    )
}  # fmt: skip
"""All ways by name."""


def chosen(names: str | None) -> tuple[Way, ...]:
    """The ways of a comma-separated list; by default all.

    Raises:
      ValueError: a name is unknown, or given twice.
    """
    wanted = tuple(WAYS) if names is None else tuple(name.strip() for name in names.split(','))
    unknown = [name for name in wanted if name not in WAYS]
    if unknown or len(set(wanted)) < len(wanted):
        what = f'unknown method {unknown[0]!r}' if unknown else f'a method twice in {names!r}'
        raise ValueError(f'{what}. Methods: {", ".join(WAYS)}')
    return tuple(WAYS[name] for name in wanted)
