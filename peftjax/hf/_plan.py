"""From a stored adapter to phi: a method that computes the same, its arrays from the tensors."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from peftjax._chain import Chain, chain
from peftjax._manifest import CheckpointError
from peftjax._method import Method
from peftjax._peft import Peft, nested
from peftjax._shapes import differences
from peftjax._sites import Site
from peftjax._types import Path, Phi
from peftjax.hf._layout import Layout, layout
from peftjax.hf._model import Model
from peftjax.hf._names import Table
from peftjax.hf._prefix import prefix_layout, prompt_layout
from peftjax.hf._stacked import LayersDifferError
from peftjax.hf._stored import Stored
from peftjax.methods import PrefixTuning, PromptTuning, Trainable

Rewrite = Callable[[dict[str, Any]], dict[str, Any]]
"""From stored tensors to others that mean the same; differentiable."""

Key = tuple[tuple[str, ...], Path, str]
"""Where an array of phi is: keys of the part, path, name."""


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What a configuration asks for, in our terms.

    Attributes:
      methods: that compute the same, by name; the first listed closest to the weights.
      rewrites: of the tensors, before phi is filled with them.
      idle: tensors that hold nothing new, such as copies of the base.
      listed: keys of the configuration that have no effect on a trained adapter.
      notes: what the user should know.
      unknown: keys that nobody knows, with their values.
    """

    methods: Mapping[str, Method]
    rewrites: tuple[Rewrite, ...] = ()
    idle: frozenset[str] = frozenset()
    listed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def method(self) -> Method | Chain:
        """All of them as one."""
        if not self.methods:
            raise ValueError('an adapter must adapt something; its configuration asks for nothing')
        several = len(self.methods) > 1
        return chain(**self.methods) if several else next(iter(self.methods.values()))

    def rewritten(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors that phi is filled with."""
        found = dict(tensors)
        for rewrite in self.rewrites:
            found = rewrite(found)
        return {name: tensor for name, tensor in found.items() if name not in self.idle}


def layouts(peft: Peft, table: Table) -> dict[Key, Layout]:
    """How every array of phi is stored."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, shape, _ in peft.phi:
        owner, _, name = path.rpartition('/')
        shapes.setdefault(owner, {})[name] = shape
    found: dict[Key, Layout] = {}
    for (keys, part), chosen in zip(peft.method.parts, peft.sites, strict=True):
        start = ''.join(f'{key}/' for key in keys)
        sites = {site.path: site for site in chosen}
        shared = [p.removeprefix(start) for p in shapes if p.startswith(start)]
        for path in dict.fromkeys((*sites, *shared)):
            for name, shape in shapes.get(f'{start}{path}', {}).items():
                if path in sites or isinstance(part, PrefixTuning):
                    where = keys, path, name
                    found[where] = _layout(part, sites, path, name, shape, table)
    return found


def _layout(
    part: Method,
    sites: Mapping[Path, Site],
    path: Path,
    name: str,
    shape: tuple[int, ...],
    table: Table,
) -> Layout:
    if isinstance(part, PromptTuning):
        return prompt_layout(sites[path], shape)
    if isinstance(part, PrefixTuning):
        return prefix_layout(path, name, shape, tuple(sites.values()))
    return layout(part, sites[path], table, name, shape)


def check(found: Mapping[Key, Layout], tensors: Mapping[str, Any], stored: Stored) -> list[str]:
    """Compares the tensors that are there with those that phi needs.

    Returns:
      The names of those that phi has no place for, as in the file.

    Raises:
      CheckpointError: some are missing, or of another shape.
    """
    want = {slot.name: slot.shape for one in found.values() for slot in one.slots}
    have = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    extra = [name for name in have if name not in want]
    wrong = differences(want, {n: s for n, s in have.items() if n in want}, 'shape ')
    if wrong:
        raise CheckpointError(
            f'the adapter in {str(stored.folder)!r} must hold the {len(want)} tensors that its '
            f'configuration asks for in this model: {wrong}. Take the model and the configuration '
            'that it was trained with'
        )
    return [stored.names.get(name, name) for name in extra]


def fill(found: Mapping[Key, Layout], tensors: Mapping[str, Any]) -> Phi:
    """Phi from tensors that were checked; differentiable."""
    parts: dict[tuple[str, ...], dict[Path, dict[str, Any]]] = {}
    for (keys, path, name), one in found.items():
        array = one.load([tensors[slot.name] for slot in one.slots])
        parts.setdefault(keys, {}).setdefault(path, {})[name] = array
    return nested(parts.items())


def require(expected: Iterable[str], found: Iterable[str], where: str, what: str) -> None:
    """Refuses an adapter without what its configuration asks for.

    Args:
      expected: names.
      found: those that are there.
      where: the configuration, for the message.
      what: is expected, for the message.

    Raises:
      CheckpointError: something is missing.
    """
    there = set(found)
    if missing := [name for name in dict.fromkeys(expected) if name not in there]:
        raise CheckpointError(
            f'{where}: an adapter must hold {what} that its configuration asks for in this model; '
            f'missing: {", ".join(map(repr, missing[:10]))} ({len(missing)} in all). '
            'Take the model and the configuration that it was trained with'
        )


def whole_leaves(model: Model, modules: Iterable[str]) -> dict[Path, tuple[str, ...]]:
    """The leaves that some modules are the layers of.

    Args:
      model: the base.
      modules: those that the adapter has tensors for, all of them in the model.

    Returns:
      For each path the stored names of its modules.

    Raises:
      LayersDifferError: a stacked leaf is adapted in some of its layers only.
    """
    table, found, leaves = model.table, set(modules), {}
    for path in dict.fromkeys(p for m in modules if (p := _path(table, m)) is not None):
        mine = table.parameters(path) if table.is_raw(path) else table.modules(path)
        if absent := [module for module in mine if module not in found]:
            raise LayersDifferError(
                f'{path!r} is a stack of layers, adapted in all of them or none; this adapter '
                f'leaves out {absent[0]!r} ({len(absent)} of {len(mine)})'
            )
        leaves[path] = mine
    return leaves


def _path(table: Table, module: str) -> Path | None:
    place = table.weight(module) or table.places.get(table.own(module))
    return None if place is None else place.site.path


def saved_leaves(model: Model, names: Iterable[str]) -> Trainable:
    """The method that trains some parameters in full.

    Raises:
      LayersDifferError: a stacked leaf is trained in some of its layers only.
    """
    names = set(names)
    paths = {place.site.path: None for n in sorted(names) if (place := model.place(n)) is not None}
    for path in paths:
        if absent := [n for n in model.table.parameters(path) if n not in names]:
            raise LayersDifferError(
                f'{path!r} is a stack of layers, trained in all of them or none; this adapter '
                f'leaves out {absent[0]!r}'
            )
    return Trainable(target=model.target(paths))
