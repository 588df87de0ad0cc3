"""Notes how leaves are used while an apply function is traced."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence, Set
from typing import Any

import jax

from peftjax._method import At, Rule
from peftjax._own_bias import owns
from peftjax._pending import Pending
from peftjax._sites import Site
from peftjax._standin import StandIn
from peftjax._types import Array, Path
from peftjax._uses import Use

ELEMENTWISE = {'add': 'bias', 'sub': 'bias', 'mul': 'scale', 'div': 'scale'}


@dataclasses.dataclass(eq=False)
class Recorder(Rule):
    """Stands at every leaf while sites are discovered.

    Attributes:
      leaves: their shapes and dtypes, by path.
      sites: what was found, in order.
      opaque: why nothing that is noted may take the efficient path, else empty.
      users: for each leaf, the layers whose bias it is; an empty path for any other use.
      taken: the axes along which one layer of the leaf was cut out at a fixed place, and where.
      changed: whether numbers were added to the leaf, or multiplied with it, on its way.
      scale: the number that the output is multiplied with at once; `None` if that is not known.
    """

    deferred = True

    leaves: dict[Path, jax.ShapeDtypeStruct]
    sites: dict[Site, None] = dataclasses.field(default_factory=dict)
    opaque: str = ''
    users: dict[Path, set[Path]] = dataclasses.field(default_factory=lambda: defaultdict(set))
    taken: tuple[tuple[int, int], ...] = ()
    changed: bool = False
    scale: float | None = 1.0

    def within(self, opaque: str) -> 'Recorder':
        """Notes the same sites, where the efficient path is closed."""
        return dataclasses.replace(self, opaque=self.opaque or opaque)

    def shifted(self, opaque: str) -> 'Recorder':
        """Notes uses of what was made of a leaf and a number as uses of the leaf."""
        return dataclasses.replace(self.within(opaque), changed=True)

    def scaled(self, number: float | None) -> 'Recorder':
        """Notes uses as those of a leaf whose output is multiplied with a number."""
        return dataclasses.replace(self, scale=number)

    def cut(self, view: StandIn, start: Sequence[int], limit: Sequence[int]) -> StandIn:
        """Keeps in mind which layer of a leaf is cut out."""
        cuts = zip(view.dims, start, limit, view.shape, strict=True)
        taken = {min(label): a for label, a, b, n in cuts if label and b - a == 1 < n}
        rule = dataclasses.replace(self, taken=(*self.taken, *taken.items()))
        return dataclasses.replace(view, rule=rule)

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

    def elementwise(self, view: StandIn, primitive: str, output: tuple[int, ...]) -> bool:
        """Notes a bias or a scale, if it is one: a leaf that is repeated, or has but one axis."""
        repeated = any(n > 1 and not label for n, label in zip(output, view.dims, strict=False))
        vector = sum(n > 1 for n in view.shape) <= 1
        if primitive not in ELEMENTWISE or not (repeated or vector):
            return False
        self._note(view, ELEMENTWISE[primitive], (), range(len(view.dims)), (), output, '')
        return True

    def owned(self, view: StandIn, output: Pending) -> bool:
        """Whether a leaf that is added to an output is the bias of its layer, as it stands."""
        taken = lambda one: dict(one.rule.taken)
        return not self.changed and owns(output, view, self.leaves, taken)

    def bias(self, view: StandIn, output: Pending) -> None:
        """Notes a leaf that is added to the output of its own layer."""
        owners = {at.view.path for at, _, _ in output.steps}
        shape = output.value.shape
        self._note(view, 'bias', (), range(len(view.dims)), (), shape, '', owners)

    def elsewhere(self, view: StandIn, why: str, output: tuple[int, ...]) -> None:
        """Notes that only the dense leaf will do."""
        self._note(view, 'other', (), (), (), output, self.opaque or why)

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
        bias: tuple[StandIn, ...],
        output: tuple[int, ...],
        why: str,
        users: Set[Path] = frozenset(('',)),
    ) -> None:
        self.users[view.path] |= users
        leaf = self.leaves[view.path]
        shape = tuple(leaf.shape)
        rank = len(shape)
        inputs: set[int] = set().union(*(view.dims[d] for d in contract))
        outputs: set[int] = set().union(*(view.dims[d] for d in free))
        if inputs & outputs or not (inputs or outputs):
            # the trace gives no meaning to the axes: the last two are read as a matrix
            inputs, outputs = set(range(max(rank - 2, 0), rank - 1)), set(range(rank)[-1:])
        added = {one.path: self._axes(one) for one in bias}
        site = Site(
            path=view.path,
            kind=kind,
            shape=shape,
            dtype=str(leaf.dtype),
            stack=tuple(d for d in range(rank) if d not in inputs | outputs),
            inputs=tuple(sorted(inputs)),
            outputs=tuple(sorted(outputs)),
            bias=tuple(added),
            bias_axes=tuple(added.values()),
            output=tuple(output),
            dense=why,
            scale=self.scale if kind == 'embedding' else None,
        )
        self.sites.setdefault(site)

    def _axes(self, view: StandIn) -> tuple[int, ...]:
        """The axes of a leaf: those that are gone by now, then the others as they lie."""
        here = [axis for label in view.dims for axis in sorted(label)]
        return (*(d for d in range(len(self.leaves[view.path].shape)) if d not in here), *here)


def outputs(recorder: Recorder) -> dict[Any, list[tuple[int, ...]]]:
    """The shapes of all outputs, for each way in which a leaf is used."""
    found: dict[Any, list[tuple[int, ...]]] = {}
    for site in recorder.sites:
        shapes = found.setdefault(site.use, [])
        shapes += [site.output] if site.output not in shapes else []
    return found


def distinct(recorder: Recorder) -> tuple[Site, ...]:
    """The sites found, one for each way in which a leaf is used; leaves in order, then names."""
    found: dict[tuple[Any, ...], Site] = {}
    for site in recorder.sites:
        key = site.use
        before = found.setdefault(key, site)
        added = {
            path: axes
            for s in (before, site)
            for path, axes in zip(s.bias, s.bias_axes, strict=True)
        }
        found[key] = dataclasses.replace(
            before,
            bias=tuple(added),
            bias_axes=tuple(added.values()),
            dense=before.dense or site.dense,
            scale=before.scale if before.scale == site.scale else None,
        )
    uses = Counter(site.path for site in found.values())
    order = {path: i for i, path in enumerate(recorder.leaves)}
    sites = [
        dataclasses.replace(
            s,
            shared=uses[s.path] > 1,
            bias_shared=tuple(path for path in s.bias if recorder.users[path] != {s.path}),
        )
        for s in found.values()
    ]
    # of several uses of a leaf the first counts: one that tells the meaning of its axes
    return tuple(sorted(sites, key=lambda s: (order.get(s.path, len(order)), bool(s.dense))))
