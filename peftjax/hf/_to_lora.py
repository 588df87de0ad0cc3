"""From our low-rank methods to PEFT's `LoraConfig`."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from peftjax._lowrank import LowRankMethod
from peftjax._sites import Site
from peftjax._types import Path
from peftjax.hf._config import whole
from peftjax.hf._experts import Parts, fused, in_common, is_expert, join, renewed
from peftjax.hf._names import CONV1D
from peftjax.hf._suffix import ends, together
from peftjax.hf._writing import Part, Writing
from peftjax.methods import Dora

Modules = dict[Path, tuple[str, ...]]
Tensors = dict[str, np.ndarray]


class Scale(NamedTuple):
    """What a pair is scaled by: `alpha / rank`, or `alpha / sqrt(rank)`."""

    rank: int
    alpha: float


Scales = Mapping[Path, Scale]


class Tied(NamedTuple):
    """A head that has its pair in common with the table."""

    head: str
    listed: list[str]
    """Names that must be among the targets."""
    scale: Scale


class Parameter(NamedTuple):
    """A parameter beside others in its module, as PEFT adapts it."""

    name: str
    scale: Scale
    shape: tuple[int, int]
    said: bool
    """Whether its rank must be said, though it is the default."""


def write_lora(out: Writing, part: Part) -> tuple[str, ...]:
    """Adds a `LoraConfig` and its tensors.

    Returns:
      The names of the modules that are adapted.

    Raises:
      ValueError: PEFT has no place for it.
    """
    method = part.method
    assert isinstance(method, LowRankMethod)
    scales = {site.path: _scale(method, site) for site in part.sites}
    default = _default(method)
    raw = [site for site in part.sites if out.table.is_raw(site.path)]
    chosen = out.modules(site for site in part.sites if site not in raw)
    parameters, chosen, tensors = _experts(out, method, chosen, scales, out.stored(part))
    parameters = [*_raw(out, method, raw, scales), *parameters]
    tied = [_tie(out, site, scales[site.path], tensors) for site in part.sites if site.shared]
    out.config |= {
        'peft_type': 'LORA',
        'r': default.rank,
        'lora_alpha': default.alpha,
        'lora_dropout': method.dropout,
        'use_rslora': method.rank_stabilized,
        'use_dora': isinstance(method, Dora),
        'target_modules': sorted({*out.ends(chosen), *(n for one in tied for n in one.listed)}),
        'bias': 'none',
        'fan_in_fan_out': _fan_in_fan_out(chosen),
        'init_lora_weights': True,
    }
    if tied:
        out.config['ensure_weight_tying'] = True
    if parameters:
        out.config['target_parameters'] = _parameter_ends(out, parameters)
        tensors = _nested(parameters, tensors)
    for field, key in (('rank', 'rank_pattern'), ('alpha', 'alpha_pattern')):
        usual = getattr(default, field)
        values = {path: getattr(scales[path], field) for path in chosen}
        heads = {re.escape(one.head): getattr(one.scale, field) for one in tied}
        out.config[key] = {
            **_patterns(out, chosen, values, usual),
            **{head: value for head, value in heads.items() if value != usual},
            **_parameter_patterns(out, parameters, field, usual),
        }
    out.tensors |= {f'base_model.model.{name}': tensor for name, tensor in tensors.items()}
    return tuple(name for names in chosen.values() for name in names)


def _fan_in_fan_out(chosen: Modules) -> bool:
    """Whether the weights are those of GPT-2, stored `(in, out)`."""
    owners = [name.rpartition('.')[2] for names in chosen.values() for name in names]
    return bool(owners) and all(owner in CONV1D for owner in owners)


def _default(method: LowRankMethod) -> Scale:
    return Scale(method.rank, whole(method.rank if method.alpha is None else method.alpha))


def _scale(method: LowRankMethod, site: Site) -> Scale:
    rank = method.rank_at(site)
    root = rank**0.5 if method.rank_stabilized else rank
    return Scale(rank, whole(method.scale_at(site) * root))


def _patterns(
    out: Writing, chosen: Modules, values: Mapping[Path, Any], default: Any
) -> dict[str, Any]:
    """Values that differ from the default, by regular expression."""
    found = {}
    for value in dict.fromkeys(values.values()):
        if value != default:
            mine = {path: names for path, names in chosen.items() if values[path] == value}
            found |= {re.escape(end): value for end in out.ends(mine)}
    return found


def _tie(out: Writing, site: Site, scale: Scale, tensors: Tensors) -> Tied:
    """A table that is the head too: PEFT keeps its pair once more, for the head."""
    (head, listed), [table] = out.head_of(site), out.table.modules(site.path)
    if f'{table}.lora_magnitude_vector' in tensors:
        raise ValueError(
            f'PEFT splits a table and the head tied to it in different directions; {site.path!r} '
            'is both. Use Lora, or give the head a parameter of its own'
        )
    a, b = (tensors[f'{table}.lora_embedding_{x}'] for x in 'AB')
    tensors |= {f'{head}.lora_A.weight': b.T, f'{head}.lora_B.weight': a.T}
    return Tied(head, listed, scale)


# Parameters of modules that have several ----------------------------------------------------------


def _raw(
    out: Writing, method: LowRankMethod, sites: Iterable[Site], scales: Scales
) -> Iterable[Parameter]:
    """Those that are parameters here too; in each module in the order of their use."""
    for site in sites:
        if isinstance(method, Dora) or method.dropout:
            raise ValueError(
                f'PEFT adapts a parameter that is no module of its own, such as {site.path!r}, by '
                'plain LoRA without dropout. Leave it out, or use Lora(dropout=0.0)'
            )
        for name in out.table.parameters(site.path):
            yield Parameter(name, scales[site.path], (site.shape[-2], site.shape[-1]), False)


def _nested(parameters: Iterable[Parameter], tensors: Tensors) -> Tensors:
    """PEFT wraps a module once for each of its parameters, the first of them innermost."""
    owners: dict[str, list[Parameter]] = {}
    for parameter in parameters:
        owners.setdefault(parameter.name.rpartition('.')[0], []).append(parameter)
    renamed = {}
    for owner, mine in owners.items():
        own = tuple(f'{one.name}.' for one in mine)
        inside = [n for n in tensors if n.startswith(f'{owner}.') and not n.startswith(own)]
        if inside:
            raise ValueError(
                f'PEFT wraps {owner!r} for its parameters, and names what is inside otherwise; '
                f'{inside[0].rpartition(".lora_")[0]!r} is. Leave it out of the target'
            )
        if len({(one.shape, one.scale.rank) for one in mine}) < len(mine):
            raise ValueError(
                f'PEFT tells the parameters of {owner!r} apart by the order in which the module '
                f'has them, which is not known here, and by shapes: {[one.name for one in mine]} '
                'have one shape and rank. Give them different ranks'
            )
        for depth, one in enumerate(reversed(mine)):
            level = f'{owner}{".base_layer" * depth}'
            renamed |= {f'{one.name}.lora_{x}.weight': f'{level}.lora_{x}.weight' for x in 'AB'}
    return {renamed.get(name, name): tensor for name, tensor in tensors.items()}


def _parameter_ends(out: Writing, parameters: Iterable[Parameter]) -> list[str]:
    kinds: dict[str, tuple[str, ...]] = {}
    for one in parameters:
        kinds[together(one.name)] = (*kinds.get(together(one.name), ()), one.name)
    chosen = {name for names in kinds.values() for name in names}
    # Of layers in a scan the first stands for all.
    every = [renewed(out.naming(path).replace('{}', '0')) for path in out.paths]
    every += fused(name.removesuffix('.weight') for name in every)
    others = {together(name) for name in every if name not in chosen}
    return sorted({e for kind, names in kinds.items() for e in ends(kind, names, others, 2)})


def _parameter_patterns(
    out: Writing, parameters: Iterable[Parameter], field: str, default: Any
) -> dict[str, Any]:
    found = {}
    parameters = [*parameters]
    for value in dict.fromkeys(getattr(one.scale, field) for one in parameters):
        mine = [one for one in parameters if getattr(one.scale, field) == value]
        if value == default:
            mine = [one for one in mine if one.said]
        found |= {re.escape(end): value for end in _parameter_ends(out, mine)}
    return found


# Experts that are modules -------------------------------------------------------------------------


class Experts(NamedTuple):
    """What becomes of experts: parameters, and what stays modules."""

    parameters: list[Parameter]
    chosen: Modules
    tensors: Tensors


def _experts(
    out: Writing, method: LowRankMethod, chosen: Modules, scales: Scales, tensors: Tensors
) -> Experts:
    """Experts as PEFT loads them over transformers 5, where they are parameters.

    Where all of an expert is adapted alike they stay modules, as in transformers 4: PEFT makes
    parameters of these itself, and makes the right ones.
    """
    paths = {name: path for path, names in chosen.items() for name in names}
    families = fused(paths) | _routers(out, paths)
    members = {name for parts in families.values() for part in parts for name in part}
    lone = sorted(name for name in paths if is_expert(name) and name not in members)
    if lone or (families and (isinstance(method, Dora) or method.dropout)):
        out.notes.append(
            f'{lone[0] if lone else min(members)!r} is written as a module, which experts are in '
            'transformers 4 alone: of those of transformers 5, which are parameters, PEFT adapts '
            'gate and up together, by plain LoRA without dropout'
        )
        return Experts([], chosen, tensors)
    several = [parts for parts in families.values() if len(parts) > 1]
    alike = bool(several) and all(in_common(parts, tensors) for parts in several)
    if not families or (not alike and _converted(out, method, chosen, families, scales)):
        return Experts([], chosen, tensors)
    made, joined = [], dict(tensors)
    for name, parts in families.items():
        apart = not alike and len(parts) > 1
        scale = _one_scale(name, {scales[paths[part[0]]] for part in parts})
        if apart:
            times = len(parts) ** (0.5 if method.rank_stabilized else 1)
            scale = Scale(len(parts) * scale.rank, whole(times * scale.alpha))
        pair = join(name, parts, joined, apart)
        a, b = pair.values()
        made.append(Parameter(name, scale, (b.shape[0], a.shape[1]), apart))
        for module in (module for part in parts for module in part):
            del joined[f'{module}.lora_A.weight'], joined[f'{module}.lora_B.weight']
        joined |= pair
    left = {path: names for path, names in chosen.items() if names[0] not in members}
    return Experts(made, left, joined)


def _routers(out: Writing, modules: Iterable[str]) -> dict[str, Parts]:
    """The layers that choose between experts, whose weights are parameters in transformers 5."""
    beside = {
        together(name).partition('.experts.')[0] for name in out.shapes if '.experts.' in name
    }
    found = (name for name in modules if name.endswith('.gate'))
    mine = (name for name in found if together(name).removesuffix('.gate') in beside)
    return {f'{renewed(name)}.weight': ((name,),) for name in mine}


def _one_scale(name: str, scales: set[Scale]) -> Scale:
    if len(scales) > 1:
        raise ValueError(
            f'transformers keeps gate and up of experts in one parameter, {name!r}, for which '
            f'PEFT has one rank and one alpha; got {sorted(scales)}. Give both the same'
        )
    return next(iter(scales))


def _converted(
    out: Writing, method: LowRankMethod, chosen: Modules, families: dict[str, Parts], scales: Scales
) -> bool:
    """Whether PEFT makes the right parameters of these modules.

    It takes it for granted that each expert is adapted whole, or `down_proj` alone, in all layers,
    at the rank and alpha of the adapter; and it doubles both, which keeps `alpha / rank` only. Of a
    router it forgets patterns, too.
    """
    members = {name for parts in families.values() for part in parts for name in part}
    mine = {path: names for path, names in chosen.items() if names[0] in members}
    return (
        not method.rank_stabilized
        and all(scales[path] == _default(method) for path in mine)
        and not members & set(out.ends(mine))
        and {name.rpartition('.')[2] for name in families} - {'weight'} != {'gate_up_proj'}
    )
