"""Notes how leaves are used while an apply function is traced."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from peftjax._method import At, Rule
from peftjax._sites import Site
from peftjax._standin import StandIn
from peftjax._types import Array, Path
from peftjax._use import Use

ELEMENTWISE = {'add': 'bias', 'sub': 'bias', 'mul': 'scale', 'div': 'scale'}


@dataclasses.dataclass(eq=False)
class Recorder(Rule):
    """Stands at every leaf while sites are discovered.

    Attributes:
      shapes: of the leaves, by path.
      sites: what was found, in order.
      opaque: why nothing here may take the efficient path, else empty.
    """

    deferred = True

    shapes: dict[Path, tuple[int, ...]]
    sites: dict[Site, None] = dataclasses.field(default_factory=dict)
    opaque: str = ''

    def post(self, at: At, x: Array, y: Array) -> Array:
        """Notes a use."""
        del x
        use = at.use
        why = self.opaque or self._split(at.view, use)
        self._note(at.view, use.kind, use.contract, use.free, at.bias, y.shape, why)
        return y

    def dense(self, view: StandIn, w: Array) -> Array:
        """The leaf itself."""
        del view
        return w

    def elsewhere(self, view: StandIn, primitive: str, output: tuple[int, ...]) -> None:
        """Notes a use that is not linear in the weight."""
        kind = ELEMENTWISE.get(primitive, 'other')
        why = self.opaque or (f'enters {primitive}' if kind == 'other' else '')
        made = range(len(view.dims)) if kind != 'other' else ()
        self._note(view, kind, (), made, (), output, why)

    def named(self, path: Path, value: Array, stack: tuple[int, ...]) -> None:
        """Notes a named value; its last dimension counts as its outputs."""
        layers = len(stack)
        site = Site(
            path=path,
            kind='named',
            shape=(*stack, *value.shape[-1:]),
            dtype=str(value.dtype),
            stack=tuple(range(layers)),
            outputs=(layers,) if value.shape else (),
            output=value.shape,
            dense=self.opaque,
        )
        self.sites.setdefault(site)

    @staticmethod
    def _split(view: StandIn, use: Use) -> str:
        """Whether one axis of the leaf plays two parts."""
        parts = [
            set().union(*(view.dims[d] for d in dims))
            for dims in (use.contract, use.free, use.batch)
        ]
        twice = parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
        return f'axis {min(twice)} is split between input and output' if twice else ''

    def _note(
        self,
        view: StandIn,
        kind: str,
        contract: Sequence[int],
        free: Sequence[int],
        bias: tuple[Path, ...],
        output: tuple[int, ...],
        why: str,
    ) -> None:
        shape = self.shapes[view.path]
        rank = len(shape)
        inputs: set[int] = set().union(*(view.dims[d] for d in contract))
        outputs: set[int] = set().union(*(view.dims[d] for d in free))
        if inputs & outputs or not (inputs or outputs):
            # the trace gives no meaning to the axes: the last two are read as a matrix
            inputs, outputs = set(range(max(rank - 2, 0), rank - 1)), set(range(rank)[-1:])
        site = Site(
            path=view.path,
            kind=kind,
            shape=shape,
            dtype=str(view.dtype),
            stack=tuple(d for d in range(rank) if d not in inputs | outputs),
            inputs=tuple(sorted(inputs)),
            outputs=tuple(sorted(outputs)),
            bias=tuple(sorted(set(bias))),
            output=tuple(output),
            dense=why,
        )
        self.sites.setdefault(site)


def distinct(recorder: Recorder) -> tuple[Site, ...]:
    """The sites found, one for each way in which a leaf is used; leaves in order, then names."""
    found: dict[tuple[Any, ...], Site] = {}
    for site in recorder.sites:
        key = (site.path, site.kind, site.inputs, site.outputs)
        before = found.setdefault(key, site)
        bias = tuple(sorted({*before.bias, *site.bias}))
        found[key] = dataclasses.replace(before, bias=bias, dense=before.dense or site.dense)
    uses = Counter(site.path for site in found.values())
    order = {path: i for i, path in enumerate(recorder.shapes)}
    sites = [dataclasses.replace(s, shared=uses[s.path] > 1) for s in found.values()]
    return tuple(sorted(sites, key=lambda site: order.get(site.path, len(order))))
