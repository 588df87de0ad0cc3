"""A quantized leaf as a stand-in: it becomes a weight where it is used, and nowhere else.

Codes and scales are factors: they lie along the axes of the weight but the last, whose numbers are
their extra dimension. What moves factors moves them, as long as the last axis stays whole.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from peftjax._factor import lay
from peftjax._method import At, Rule
from peftjax._quantized import Quantized
from peftjax._standin import Hole, StandIn
from peftjax._types import Array, Path


@dataclasses.dataclass(frozen=True)
class Dequantize(Rule):
    """Makes the weight of its codes.

    Attributes:
      kind: the leaf without its arrays.
      last: its last axis.
    """

    noted: ClassVar[bool] = False

    kind: Quantized
    last: int

    def _row(self, view: StandIn) -> int | None:
        """The dimension where the last axis lies, if it is whole."""
        rows = [d for d, label in enumerate(view.dims) if self.last in label]
        (row,) = rows if len(rows) == 1 else (None,)
        if row is None or view.dims[row] != {self.last}:
            return None
        return row if view.shape[row] == self.kind.width else None

    def holds(self, view: StandIn) -> bool:
        """The last axis is whole, and nothing is repeated."""
        sizes = zip(view.dims, view.shape, strict=True)
        return self._row(view) is not None and all(label or n == 1 for label, n in sizes)

    def run(self, at: At, x: Array, below: Callable[[Any], Any]) -> Array:
        """Looks up the codes of some rows, or makes the weight once more for gradients.

        The weight is not kept for the backward pass: `jax.checkpoint` makes it again.
        """
        del below
        view = at.view
        if at.use.free == (self._row(view),):
            parts = {name: view.factor(name) for name in view.laid}
            if (found := at.use.find(x, parts, self._made)) is not None:
                return self._cast(view, found)
        return jax.checkpoint(lambda x, view: at.use.run(x, view.dense()))(x, view)

    def dense(self, view: StandIn, w: Any) -> Array:
        """The weight as it stands now."""
        del w
        row = self._row(view)
        assert row is not None
        made = jnp.squeeze(self._made(view.factors), row)
        return self._cast(view, jnp.moveaxis(made, -1, row))

    def _made(self, parts: dict[str, Any]) -> Array:
        return self.kind.made_of(parts).dequantize()

    @staticmethod
    def _cast(view: StandIn, w: Array) -> Array:
        for dtype in view.w.casts:
            w = w.astype(dtype)
        return w


def stand(path: Path, leaf: Any) -> Any:
    """What stands for a leaf before any method does: a stand-in, if it is quantized."""
    if not isinstance(leaf, Quantized):
        return leaf
    last = leaf.ndim - 1
    lead = tuple(range(last))
    laid = {name: lay(part, (*lead, None), leaf.ndim) for name, part in leaf.parts.items()}
    kind = dataclasses.replace(leaf, codes=None, scales=None, steps=None)
    return StandIn(
        w=Hole(jax.eval_shape(leaf.dequantize)),
        laid={name: f.array for name, f in laid.items()},
        dims=tuple(frozenset({d}) for d in range(leaf.ndim)),
        spans=tuple((name, frozenset(lead)) for name in laid),
        rule=Dequantize(kind, last),
        path=path,
        orders=tuple((name, f.order) for name, f in laid.items()),
    )
