"""Outputs that wait for their layer's own bias before a method sees them."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from peftjax import _paths
from peftjax._method import At, Rule
from peftjax._standin import StandIn
from peftjax._types import Array, Path


@dataclasses.dataclass(frozen=True)
class Companion(Rule):
    """Marks a leaf that may be the bias of a layer whose output is adapted."""

    noted: ClassVar[bool] = False

    def fits(self, at: At) -> bool:
        """It is a plain array wherever it is used."""
        del at
        return False

    def dense(self, view: StandIn, w: Array) -> Array:
        """The leaf itself."""
        del view
        return w


@dataclasses.dataclass
class Pending:
    """An output that waits for its layer's bias before methods of the output seam see it."""

    value: Array
    steps: tuple[tuple[At, Array, Rule], ...]
    where: Any
    moves: tuple[tuple[Callable[[Array], Array], Callable[[Array], Array]], ...] = ()
    bias: tuple[StandIn, ...] = ()

    @property
    def parents(self) -> set[Path]:
        """The modules whose biases belong to this output."""
        return {_paths.parent(at.view.path) for at, _, _ in self.steps}

    def scaled(self, number: float | None) -> 'Pending':
        """The same, where each rule knows what the output is multiplied with at once."""
        steps = tuple((at, x, rule.scaled(number)) for at, x, rule in self.steps)
        return dataclasses.replace(self, steps=steps)

    def resolve(self) -> Array:
        """The output, adapted."""
        y = self.value
        with self.where.manager:
            for undo, _ in reversed(self.moves):
                y = undo(y)
            for at, x, rule in self.steps:
                y = rule.post(dataclasses.replace(at, bias=self.bias), x, y)
            for _, redo in self.moves:
                y = redo(y)
        return y


def settled(value: Any) -> Any:
    """A value that no longer waits."""
    return value.resolve() if isinstance(value, Pending) else value
