"""From PEFT's `target_parameters` to leaves: experts, and other parameters that share a module."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from peftjax._types import Path
from peftjax.hf._config import Fields
from peftjax.hf._draft import Draft
from peftjax.hf._experts import Parts, are_apart, fused, renewed, split
from peftjax.hf._model import Model
from peftjax.hf._names import pattern_of
from peftjax.hf._plan import require, whole_leaves
from peftjax.hf._stored import Stored


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter that a configuration targets.

    Attributes:
      name: as PEFT calls it.
      leaves: paths of ours that it is made of.
      shape: of the matrix of one expert, `(out, in)` as PEFT reads it.
      experts: how many there are, 1 for a matrix.
      parts: where it is made of modules, those of experts, their names.
      widths: the outputs of each part.
    """

    name: str
    leaves: tuple[Path, ...]
    shape: tuple[int, int]
    experts: int
    parts: Parts = ()
    widths: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Targets:
    """What `target_parameters` comes to.

    Attributes:
      leaves: for each path the names by which `rank_pattern` and `alpha_pattern` find it.
      shares: how many leaves divide the ranks of one parameter among them, by path.
    """

    leaves: Mapping[Path, tuple[str, ...]]
    shares: Mapping[Path, int]


def plan_parameters(fields: Fields, stored: Stored, model: Model, draft: Draft) -> Targets:
    """Finds the parameters that `target_parameters` names, and renames their tensors.

    PEFT wraps a module once for each of its parameters, in an order of its own: shapes and ranks
    tell which is whose. They are read as `(experts, out, in)`, as PEFT does for all modules but
    those that transformers calls `is_transposed`.

    Raises:
      CheckpointError: a wrapper is missing.
      ValueError: shapes do not tell; some layers of a stack are left out.
    """
    targets = fields.names('target_parameters')
    targets = (targets,) if isinstance(targets, str) else targets
    every = (*_plain(model, stored), *_of_experts(model))
    hit = lambda one, target: f'.{one.name}'.endswith(f'.{target}')
    dead = [target for target in targets if not any(hit(one, target) for one in every)]
    draft.listed += [f'target_parameters {target!r}, which no parameter has' for target in dead]
    found = [one for one in every if any(hit(one, target) for target in targets)]
    if not found:
        return Targets({}, {})
    renamed = _unwrapped(found, stored, fields)
    draft.rewrites.append(lambda tensors: {renamed.get(n, n): t for n, t in tensors.items()})
    joined = [one for one in found if one.parts]
    apart = _apart(fields, joined, {renamed.get(n, n): t for n, t in stored.tensors.items()})
    draft.rewrites += [_split(one, one.name in apart) for one in joined]
    names = [module for one in joined for part in one.parts for module in part]
    names += [one.name for one in found if not one.parts]
    leaves: dict[Path, tuple[str, ...]] = dict.fromkeys(whole_leaves(model, names), ())
    for one in found:
        leaves |= {path: (*leaves[path], one.name) for path in one.leaves}
    shares = {path: len(one.parts) for one in joined if one.name in apart for path in one.leaves}
    return Targets(leaves, shares)


def _plain(model: Model, stored: Stored) -> Iterable[Parameter]:
    """Parameters of the model as they are, the weights of its linear layers among them."""
    for name in model.table.stored_parameters():
        place = model.place(name)
        assert place is not None
        site = place.site
        if model.table.is_raw(site.path) and site.rank >= 2:
            experts = math.prod(site.sizes(site.stack[len(place.index) :]))
            yield Parameter(name, (site.path,), (site.shape[-2], site.shape[-1]), experts)
        elif name.endswith('.weight') and site.kind == 'linear':
            own = name.removesuffix('.weight')
            new = renewed(own)
            module = new if f'{new}.lora_A.weight' in stored.tensors else own
            shape = site.fan_out, site.fan_in
            parts, widths = ((own,),), (site.fan_out,)
            yield Parameter(f'{module}.weight', (site.path,), shape, 1, parts, widths)


def _of_experts(model: Model) -> Iterable[Parameter]:
    """Parameters that transformers 5 makes of modules."""
    modules = (name for name, _ in model.table.adaptable())
    for name, parts in fused(modules).items():
        sites = [place.site for part in parts if (place := model.table.weight(part[0]))]
        paths = {
            place.site.path: None for p in parts for m in p if (place := model.table.weight(m))
        }
        widths = tuple(site.fan_out for site in sites)
        shape = sum(widths), sites[0].fan_in
        yield Parameter(name, tuple(paths), shape, len(parts[0]), parts, widths)


def _unwrapped(found: Iterable[Parameter], stored: Stored, fields: Fields) -> dict[str, str]:
    """The names of wrappers, and of the parameters that they belong to."""
    said, rank = fields.patterns('rank_pattern'), fields.integer('r', 8)
    rows = lambda one: one.experts * pattern_of(one.name, said, rank)
    owners: dict[str, list[Parameter]] = {}
    for one in found:
        owners.setdefault(one.name.rpartition('.')[0], []).append(one)
    renamed: dict[str, str] = {}
    for owner, mine in owners.items():
        levels = [f'{owner}{".base_layer" * depth}' for depth in range(len(mine))]
        wrapped = [f'{level}.lora_A.weight' for level in levels]
        require(wrapped, stored.tensors, stored.where, 'every wrapper')
        pairs = (list(zip(levels, order, strict=True)) for order in itertools.permutations(mine))
        fits = [p for p in pairs if all(_fits(stored, at, one, rows(one)) for at, one in p)]
        if len(fits) != 1:
            raise ValueError(
                f'target_parameters at {owner!r}: shapes and ranks must tell which of '
                f'{[one.name for one in mine]} each pair of factors belongs to; {len(fits)} ways '
                'fit'
            )
        for level, one in fits[0]:
            renamed |= {f'{level}.lora_{x}.weight': f'{one.name}.lora_{x}.weight' for x in 'AB'}
    return renamed


def _fits(stored: Stored, level: str, one: Parameter, rows: int) -> bool:
    """Whether a pair of factors may belong to a parameter."""
    out, inner = one.shape
    a, b = (stored.tensors.get(f'{level}.lora_{x}.weight') for x in 'AB')
    return a is not None and b is not None and (a.shape, b.shape) == ((rows, inner), (out, rows))


def _apart(
    fields: Fields, joined: Iterable[Parameter], tensors: Mapping[str, Any]
) -> frozenset[str]:
    """The fused parameters of which each part has ranks of its own.

    So PEFT makes them of modules, and says their rank; parts that were trained as one share ranks.
    """
    said = fields.patterns('rank_pattern')
    several = [one for one in joined if len(one.parts) > 1]
    apart = all(
        pattern_of(one.name, said, None) is not None
        and are_apart(tensors[f'{one.name}.lora_B.weight'], len(one.parts[0]), one.widths)
        for one in several
    )
    return frozenset(one.name for one in several if apart)


def _split(one: Parameter, apart: bool) -> Any:
    def rewrite(tensors: dict[str, Any]) -> dict[str, Any]:
        pair = {name: tensors[name] for x in 'AB' if (name := f'{one.name}.lora_{x}.weight')}
        left = {name: tensor for name, tensor in tensors.items() if name not in pair}
        return left | split(one.name, one.parts, one.widths, pair, apart)

    return rewrite
