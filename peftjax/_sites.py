"""Sites: where and how an apply function uses its parameters."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp

from peftjax import _paths
from peftjax._types import Path, Target

KINDS = ('linear', 'embedding', 'convolution', 'expert', 'bias', 'scale', 'named', 'other')


def trainable(dtype: Any) -> bool:
    """Whether a dtype, or its name, is one of numbers with fractions; that of keys is none."""
    return not str(dtype).startswith('key<') and bool(jnp.issubdtype(dtype, jnp.inexact))


@dataclasses.dataclass(frozen=True)
class Site:
    """One use of one parameter leaf, or one named value.

    Attributes:
      path: of the leaf, or `@name` of a value named by `checkpoint_name`.
      kind: one of `linear`, `embedding`, `convolution`, `expert`, `bias`, `scale` (a norm's
        weight), `named`, `other` (the leaf enters an operation that is not a linear use).
      shape: of the leaf with all its stacked layers; of a named value: stacked layers, then the
        dimensions of one token.
      dtype: of the leaf or value.
      stack: the axes of stacked layers and experts: one matrix for each index.
      inputs: the axes summed over (for a lookup: the axis of rows).
      outputs: the axes produced.
      bias: paths of the leaves of the same module that are added to the output.
      bias_axes: for each of them its axes, those of stacked layers first.
      bias_shared: those among them that have other uses than this.
      output: shape of the output in the traced call, for one layer.
      dense: why the efficient path cannot be taken, else empty.
      shared: whether the leaf has other uses than this one.
      tokens: the dimension of the output along which tokens lie, where a method asked for it.
      offset: how many virtual tokens of later methods lie between the edge and this one's.
      scale: the number that what is looked up in a table is multiplied with at once, as Gemma does;
        1 if with none. `None` where it is not known: an array, several numbers, a plan that was
        saved before this was noted; and for what is no table.
    """

    path: Path
    kind: str
    shape: tuple[int, ...]
    dtype: str
    stack: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    bias: tuple[Path, ...] = ()
    bias_axes: tuple[tuple[int, ...], ...] = ()
    bias_shared: tuple[Path, ...] = ()
    output: tuple[int, ...] = ()
    dense: str = ''
    shared: bool = False
    tokens: int | None = None
    offset: int = 0
    scale: float | None = None

    @property
    def use(self) -> tuple[Any, ...]:
        """What tells one way in which a leaf is used from another."""
        return self.path, self.kind, self.inputs, self.outputs

    @property
    def rank(self) -> int:
        """The number of axes of the leaf."""
        return len(self.shape)

    def sizes(self, axes: Iterable[int]) -> tuple[int, ...]:
        """The sizes of some axes."""
        return tuple(self.shape[axis] for axis in axes)

    @property
    def fan_in(self) -> int:
        """How many numbers each output is a sum of."""
        return math.prod(self.sizes(self.inputs))

    @property
    def fan_out(self) -> int:
        """How many numbers each input contributes to."""
        return math.prod(self.sizes(self.outputs))


@dataclasses.dataclass(frozen=True)
class Sites:
    """The site table of an apply function: iterable, searchable, printable.

    Attributes:
      all: the sites in the order of the trace.
      unused: paths of the leaves that the traced call does not use.
    """

    all: tuple[Site, ...]
    unused: tuple[Path, ...] = ()

    def __iter__(self) -> Iterator[Site]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)

    def select(self, target: Target, kinds: tuple[str, ...], who: str) -> tuple[Site, ...]:
        """The sites of some kinds whose path a target finds.

        Raises:
          ValueError: a pattern finds nothing, or nothing of these kinds.
        """
        chosen: dict[Site, None] = {}
        for pattern in _paths.patterns(target):
            named = [site for site in self.all if _paths.matches(pattern, site.path)]
            fitting = [site for site in named if site.kind in kinds]
            if not named:
                raise ValueError(self._nothing(pattern))
            if not fitting:
                found = ', '.join(f'{site.path!r} ({site.kind})' for site in named[:5])
                raise ValueError(
                    f'{who} adapts sites of kind {", ".join(kinds)}; target={pattern!r} finds only '
                    f'{found}. Choose other paths, or another method'
                )
            chosen.update(dict.fromkeys(fitting))
        return tuple(site for site in self.all if site in chosen)

    def _nothing(self, pattern: str) -> str:
        paths = [site.path for site in self.all]
        close = ', '.join(repr(path) for path in _paths.nearest(pattern, paths))
        idle = [path for path in self.unused if _paths.matches(pattern, path)]
        why = f' It finds {idle[0]!r}, which the traced call does not use.' if idle else ''
        return (
            f'no site matches target={pattern!r}.{why} Nearest: {close} '
            f'({len(set(paths))} sites; print(pj.sites(...)) lists them)'
        )

    def __str__(self) -> str:
        rows = [
            (s.path, s.kind, _shape(s.shape), _axes(s), ', '.join(s.bias), s.dense or 'efficient')
            for s in self.all
        ]
        head = ('path', 'kind', 'shape', 'axes', 'bias', 'path taken')
        text = table(head, rows)
        return text + ''.join(f'\nunused: {path}' for path in self.unused)


def _axes(site: Site) -> str:
    if site.kind in ('bias', 'scale'):
        return ''
    groups = (('stack', site.stack), ('in', site.inputs), ('out', site.outputs))
    return ' '.join(f'{name}{list(axes)}' for name, axes in groups if axes)


def _shape(shape: tuple[int, ...]) -> str:
    return '×'.join(map(str, shape)) or 'scalar'


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Text in columns; a column that is empty throughout is left out."""
    lines = [head, *rows]
    keep = [c for c in range(len(head)) if any(row[c] for row in lines[1:])]
    widths = {c: max(len(row[c]) for row in lines) for c in keep}
    return '\n'.join('  '.join(row[c].ljust(widths[c]) for c in keep).rstrip() for row in lines)
