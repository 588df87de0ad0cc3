"""Hugging Face's names of parameters and modules, and where each lies in ours."""

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from peftjax._sites import Site
from peftjax._types import Path
from peftjax.hf._experts import fused

Naming = Callable[[Path], str]
"""From a path to Hugging Face's name of that parameter, `{}` where the index of a layer is."""

LEAVES = {'kernel': 'weight', 'scale': 'weight', 'embedding': 'weight'}
"""Flax's names of leaves, and PyTorch's."""

LISTS = ('layers', 'layer', 'h', 'block', 'blocks', 'experts')
"""Modules that hold a list of modules: an index follows, or our parameter is a stack."""

CONV1D = ('c_attn', 'c_fc', 'c_proj', 'q_attn')
"""GPT-2's linear layers, whose weight is stored `(in, out)`."""


def hugging_face_name(path: Path) -> str:
    """The name of a parameter in a Hugging Face model whose modules are called as ours.

    Args:
      path: of a parameter of ours.

    Returns:
      Its name, with `{}` after each list of modules that our path has no index for.

    Example:
      >>> hugging_face_name('bert/encoder/layer/attention/self/query/kernel')
      'bert.encoder.layer.{}.attention.self.query.weight'
      >>> hugging_face_name('model/layers/3/mlp/up_proj/kernel')
      'model.layers.3.mlp.up_proj.weight'
    """
    *modules, leaf = path.split('/')
    parts = []
    for module, after in itertools.zip_longest(modules, modules[1:]):
        parts.append(module)
        if module in LISTS and after is not None and not after.isdigit():
            parts.append('{}')
    return '.'.join([*parts, LEAVES.get(leaf, leaf)])


@dataclasses.dataclass(frozen=True)
class Place:
    """One parameter of a Hugging Face model, as part of one of our leaves.

    Attributes:
      site: the leaf.
      index: along the first of its stacked axes, those that its name has places for.
    """

    site: Site
    index: tuple[int, ...]


class Table:
    """The parameters of a model by their Hugging Face names.

    Args:
      sites: of the model.
      naming: from a path to a name.

    Raises:
      ValueError: two parameters have one name.
    """

    def __init__(self, sites: Iterable[Site], naming: Naming):
        self.sites: dict[Path, Site] = {}
        self.named: dict[Path, Site] = {}
        self.names: dict[Path, tuple[str, ...]] = {}
        self.places: dict[str, Place] = {}
        self.shared: set[Path] = set()
        self._added = self._dropped = ''
        for site in sites:
            if site.kind == 'named':
                self.named[site.path] = site
            elif site.path in self.sites:
                self.shared.add(site.path)
            else:
                self._add(site, naming(site.path))

    def _add(self, site: Site, template: str) -> None:
        while template.count('{}') > len(site.stack):  # A name that only looks like a list's.
            template = ''.join(template.rsplit('.{}', 1))
        count = template.count('{}')
        sizes = [range(size) for size in site.sizes(site.stack[:count])]
        names = []
        for index in itertools.product(*sizes):
            name = template.format(*index)
            if name in self.places:
                raise ValueError(
                    f'each parameter must have a name of its own; {name!r} stands for '
                    f'{self.places[name].site.path!r} and {site.path!r}. Pass other names'
                )
            self.places[name] = Place(site, index)
            names.append(name)
        self.sites[site.path], self.names[site.path] = site, tuple(names)

    def align(self, stored: Iterable[str]) -> None:
        """Finds the prefix (`model.`, `bert.`) that one side has and the other has not.

        Args:
          stored: names of parameters or modules.
        """
        own = {name.rpartition('.')[0] for name in self.places} | set(self.places)
        own |= {name.rpartition('.')[0] for name in fused(own)}
        stored = set(stored)
        counted = lambda names: Counter(f'{n.partition(".")[0]}.' for n in sorted(names))
        first = lambda names: [prefix for prefix, _ in counted(names).most_common(8)]
        choices = [('', '')]
        choices += [(prefix, '') for prefix in first(own)]
        choices += [('', prefix) for prefix in first(stored)]
        best = max(choices, key=lambda c: len(own & {c[0] + n.removeprefix(c[1]) for n in stored}))
        self._added, self._dropped = best

    def own(self, stored: str) -> str:
        """Our name for a stored one."""
        if stored in self.places or f'{stored}.weight' in self.places:
            return stored
        return self._added + stored.removeprefix(self._dropped)

    def stored(self, own: str) -> str:
        """The stored name for one of ours."""
        if self._added:
            return own.removeprefix(self._added)
        return self._dropped + own

    def module(self, name: str) -> tuple[Place, ...]:
        """The places of the parameters of a module, by its stored name."""
        name = self.own(name)
        return tuple(p for n, p in self.places.items() if n.rpartition('.')[0] == name)

    def weight(self, module: str) -> Place | None:
        """The place of the weight of a module, by its stored name."""
        return self.places.get(f'{self.own(module)}.weight')

    def depth(self, path: Path) -> int:
        """How many of a leaf's stacked axes its names have places for."""
        if path.startswith('@'):
            return len(self.named[path].stack)
        return len(self.places[self.names[path][0]].index)

    def parameters(self, path: Path) -> tuple[str, ...]:
        """The stored names of the parameters that are stacked in a leaf."""
        return tuple(self.stored(name) for name in self.names[path])

    def modules(self, path: Path) -> tuple[str, ...]:
        """The stored names of their modules; a named value has one for each layer."""
        if not path.startswith('@'):
            return tuple(name.rpartition('.')[0] for name in self.parameters(path))
        name, _, index = path.partition('/')
        site = self.named[path]
        layers = range(math.prod(site.sizes(site.stack))) if site.stack else [index or 0]
        return tuple(f'{name}.{i}' for i in layers)

    def stored_parameters(self) -> list[str]:
        """The stored names of all parameters."""
        return [self.stored(name) for name in self.places]

    def is_raw(self, path: Path) -> bool:
        """Whether a leaf is a parameter beside others in one module, not the weight of its own."""
        return not path.startswith('@') and not self.names[path][0].endswith('.weight')

    def adaptable(self) -> Iterator[tuple[str, Site]]:
        """The stored name of every module with a weight that a method of weights could adapt."""
        for path, site in self.sites.items():
            if site.kind in ('linear', 'embedding', 'expert', 'convolution'):
                for name in self.names[path]:
                    if name.endswith('.weight'):
                        yield self.stored(name.removesuffix('.weight')), site


def targeted(module: str, rule: Mapping[str, Any]) -> bool:
    """Whether PEFT's rule adapts a module.

    Args:
      module: its name.
      rule: `target_modules`, `exclude_modules`, `modules_to_save`, `layers_to_transform`,
        `layers_pattern`, as from `Fields`.
    """
    if _found(module, rule.get('exclude_modules', ())):
        return False
    if any(_is_below(module, name) for name in rule.get('modules_to_save', ())):
        return False
    target = rule.get('target_modules', ())
    if not _found(module, target):
        return False
    layers = rule.get('layers_to_transform', ())
    if not layers or isinstance(target, str):
        return True
    return _layer(module, rule.get('layers_pattern', ())) in layers


def is_saved(module: str, owners: Iterable[str]) -> bool:
    """Whether a module is trained in full, or is in one that is, as PEFT reads `modules_to_save`.

    The end of a name is enough, within a word too; `targeted` wants whole words.

    Example:
      >>> is_saved('layers.0.input_layernorm', ['norm']), is_saved('layers.0.norms', ['norm'])
      (True, False)
    """
    return any(re.match(rf'.*{re.escape(name)}($|\.)', module) for name in owners)


def _is_below(module: str, name: str) -> bool:
    return re.match(rf'(^|.*\.){re.escape(name)}($|\.)', module) is not None


def _found(module: str, target: tuple[str, ...] | str) -> bool:
    if isinstance(target, str):
        return re.fullmatch(target, module) is not None
    return module in target or any(module.endswith(f'.{name}') for name in target)


def _layer(module: str, lists: tuple[str, ...] | str) -> int | None:
    """The index of the layer that a module belongs to."""
    several = (lists,) if isinstance(lists, str) else lists
    for pattern in several or (r'[^.]*',):
        start = r'.*?\.' if not several else r'(?:^|.*?\.)'
        if found := re.match(rf'{start}{pattern}\.(?P<index>\d+)\.', module):
            return int(found['index'])
    return None


def pattern_of(module: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """The value of the first pattern that fits a module, as PEFT reads `rank_pattern`."""
    return next((v for p, v in patterns.items() if fits(module, p)), default)


def fits(module: str, pattern: str) -> bool:
    """Whether a key of `rank_pattern` is of a module."""
    return re.match(rf'(.*\.)?({pattern})$', module) is not None


def unmatched(modules: Collection[str], target: tuple[str, ...] | str) -> list[str]:
    """The names of `target_modules` that no module has."""
    names = () if isinstance(target, str) else target
    return [name for name in names if not any(_found(module, (name,)) for module in modules)]


def paths_as_target(chosen: Iterable[Path], every: Iterable[Path]) -> tuple[str, ...]:
    """Regular expressions that find the chosen paths and no other: layers together where all are.

    Example:
      >>> paths_as_target(['h/0/up', 'h/1/up'], ['h/0/up', 'h/0/down', 'h/1/up', 'h/1/down'])
      ('^h/[0-9]+/up$',)
      >>> paths_as_target(['h/1/up'], ['h/0/up', 'h/1/up'])
      ('^h/1/up$',)
    """
    chosen, groups = dict.fromkeys(chosen), {}
    for path in dict.fromkeys(every):
        groups.setdefault(_together(path), []).append(path)
    found: dict[str, None] = {}
    for path in chosen:
        together = _together(path)
        whole = all(other in chosen for other in groups.get(together, ()))
        found[together if whole else _alone(path)] = None
    return tuple(found)


def _together(path: Path) -> str:
    if path.startswith('@'):
        return path.partition('/')[0]
    return f'^{re.sub("/[0-9]+(?=/)", "/[0-9]+", _escaped(path))}$'


def _alone(path: Path) -> str:
    return path if path.startswith('@') else f'^{_escaped(path)}$'


def _escaped(path: Path) -> str:
    return re.escape(path).replace(r'\-', '-')
