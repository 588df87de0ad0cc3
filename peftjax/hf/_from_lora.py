"""From PEFT's `LoraConfig` to a plan."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from peftjax._lowrank import LowRankMethod
from peftjax._types import Path
from peftjax.hf._config import Fields, whole
from peftjax.hf._draft import Draft, Names, adapted, plan_tokens
from peftjax.hf._from_parameters import plan_parameters
from peftjax.hf._model import Model
from peftjax.hf._names import fits, pattern_of
from peftjax.hf._plan import require
from peftjax.hf._stacked import LayersDifferError
from peftjax.hf._stored import Stored
from peftjax.methods import Dora, Lora

IDLE = (
    'corda_config',
    'eva_config',
    'fan_in_fan_out',
    'loftq_config',
    'lora_ga_config',
    'megatron_config',
    'megatron_core',
    'qalora_group_size',
    'velora_config',
)
"""Keys that say how an adapter starts or is trained: nothing in what a trained one computes."""

REFUSED = {
    'layer_replication': 'the base is another model, with layers repeated. Repeat them in params',
    'alora_invocation_tokens': 'the adapter is switched on by tokens in the input',
    'arrow_config': 'it routes between other adapters',
    'kasa_config': 'the base is truncated when it is loaded',
    'monteclora_config': 'its weights are random',
    'use_bdlora': 'its factors are block-diagonal',
    'use_qalora': 'its inputs are pooled in groups',
}

MUTATING = ('pissa', 'olora', 'corda', 'loftq', 'lora_ga')
"""Ways to start that change the base."""

SUFFIXES = ('.lora_A.weight', '.lora_embedding_A')


def plan_lora(fields: Fields, stored: Stored, model: Model, draft: Draft) -> None:
    """Adds what a `LoraConfig` asks for to a draft."""
    fields.refuse(REFUSED)
    draft.note_idle(fields, IDLE)
    _note_start(fields, draft)
    names = ('target_modules', 'exclude_modules', 'modules_to_save', 'layers_pattern')
    rule: dict[str, Any] = {key: fields.names(key) for key in names}
    rule['layers_to_transform'] = fields.integers('layers_to_transform')
    parameters = plan_parameters(fields, stored, model, draft)
    _tied(fields, stored, model, draft)
    leaves = dict(parameters.leaves)
    if rule['target_modules'] or not fields.names('target_parameters'):
        leaves |= adapted(model, stored, rule, SUFFIXES, draft)
    _check_shared(leaves, model, draft)
    method = _method(fields, leaves, parameters.shares, model) if leaves else None
    if method is not None:
        draft.methods['dora' if isinstance(method, Dora) else 'lora'] = method
    modules = [name for names in leaves.values() for name in names]
    for key in ('rank_pattern', 'alpha_pattern'):
        dead = [p for p in fields.patterns(key) if not any(fits(m, p) for m in modules)]
        draft.listed += [f'{key} {pattern!r}, which no adapted module has' for pattern in dead]
    _biases(fields, stored, model, draft, modules)
    if fields.flag('lora_bias') and method is not None:
        draft.rewrites.append(_lora_bias(stored, model, draft, method, leaves))
    plan_tokens(draft, stored, model, 'trainable_token_indices', _token_ids(fields))


def _note_start(fields: Fields, draft: Draft) -> None:
    start = fields.value('init_lora_weights', True)
    if isinstance(start, str) and start.startswith(MUTATING):
        draft.notes.append(
            f'init_lora_weights={start!r} changed the base before training: outputs are right '
            'only over that changed base, which PEFT does not store with the adapter'
        )
    elif not isinstance(start, bool):
        draft.listed.append('init_lora_weights')


def _method(
    fields: Fields,
    leaves: Mapping[Path, tuple[str, ...]],
    shares: Mapping[Path, int],
    model: Model,
) -> LowRankMethod:
    """The pairs at all leaves, those of each stack of one rank and scale."""
    rank, alpha = fields.integer('r', 8), fields.number('lora_alpha', 8)
    stabilized = fields.flag('use_rslora')
    own = {
        'ranks': (fields.patterns('rank_pattern'), rank),
        'alphas': (fields.patterns('alpha_pattern'), alpha),
    }
    exceptions = {}
    for field, (patterns, default) in own.items():
        groups: dict[Any, list[Path]] = {}
        for path, modules in leaves.items():
            values = {pattern_of(module, patterns, default) for module in modules}
            if len(values) > 1:
                raise LayersDifferError(
                    f'the layers of a stack have one rank and one scale; {path!r} would have '
                    f'{field} {sorted(values)}'
                )
            share = shares.get(path, 1)
            groups.setdefault(_share(values.pop(), share, field, stabilized), []).append(path)
        exceptions[field] = tuple(
            (pattern, value)
            for value, paths in groups.items()
            if value != default
            for pattern in model.target(paths)
        )
    return (Dora if fields.flag('use_dora') else Lora)(
        target=model.target(leaves),
        rank=rank,
        alpha=alpha,
        rank_stabilized=stabilized,
        dropout=fields.number('lora_dropout', 0.0),
        **exceptions,
    )


def _share(value: Any, share: int, field: str, stabilized: bool) -> Any:
    """What is left of a rank or alpha where several leaves divide the ranks, at the same scale."""
    if share == 1:
        return value
    return (
        value // share if field == 'ranks' else whole(value / share ** (0.5 if stabilized else 1))
    )


def _biases(fields: Fields, stored: Stored, model: Model, draft: Draft, modules: list[str]) -> None:
    """The biases that are trained: of the adapted modules, or all."""
    which = fields.text('bias', 'none')
    if which not in ('none', 'all', 'lora_only'):
        raise fields.wrong('bias', "'none', 'all' or 'lora_only'", which)
    names = {
        'none': [],
        'all': [name for name in model.table.stored_parameters() if name.endswith('.bias')],
        'lora_only': [n for m in modules if model.place(n := f'{m}.bias') is not None],
    }[which]
    require(names, stored.tensors, stored.where, 'every bias')
    draft.saved.update(names)


def _lora_bias(
    stored: Stored,
    model: Model,
    draft: Draft,
    method: LowRankMethod,
    leaves: Mapping[Path, tuple[str, ...]],
) -> Any:
    """A bias of `lora_B` is added with the product, hence scaled: it goes to the layer's bias.

    That is the base's, or the one that was trained beside it.
    """
    scales: dict[str, float] = {}
    for path, modules in leaves.items():
        for module in modules:
            if model.place(f'{module}.bias') is None:
                raise ValueError(
                    f'lora_bias=True at {module!r} cannot be represented: the layer has no bias '
                    'to add it to. Add a bias of zeros to params'
                )
            scales[module] = method.scale_at(model.table.sites[path])
    trained = (f'{module}.lora_B.bias' for module in scales)
    require(trained, stored.tensors, stored.where, 'lora_B.bias for every module')
    biases = {f'{module}.bias' for module in scales}
    base = {name: model.value(name) for name in biases - stored.tensors.keys()}
    draft.saved |= biases

    def rewrite(tensors: dict[str, Any]) -> dict[str, Any]:
        found = dict(tensors)
        for module, scale in scales.items():
            name, trained = f'{module}.bias', found.pop(f'{module}.lora_B.bias')
            found[name] = (found[name] if name in found else base[name]) + scale * trained
        return found

    return rewrite


def _tied(fields: Fields, stored: Stored, model: Model, draft: Draft) -> None:
    """An adapted head that shares the table is stored twice, once for each use."""
    fields.flag('ensure_weight_tying')
    ends = '.lora_embedding_A', '.lora_A.weight'
    tables, heads = ([n.removesuffix(e) for n in stored.tensors if n.endswith(e)] for e in ends)
    for table in tables:
        place = model.table.weight(table)
        if place is None or place.site.path not in model.table.shared:
            continue
        for head in (head for head in heads if model.table.weight(head) is None):
            twins = {
                f'{head}.lora_A.weight': (f'{table}.lora_embedding_B', True),
                f'{head}.lora_B.weight': (f'{table}.lora_embedding_A', True),
                f'{head}.weight': (f'{table}.weight', False),
            }
            if all(_same(stored, head, *twin) for head, twin in twins.items()):
                draft.idle |= twins.keys() & stored.tensors.keys()
                draft.tied.add(place.site.path)


def _same(stored: Stored, one: str, other: str, transposed: bool) -> bool:
    """Whether two tensors are the same, or neither is there."""
    a, b = stored.tensors.get(one), stored.tensors.get(other)
    if a is None or b is None:
        return a is b
    return np.array_equal(a, b.T if transposed else b)


def _check_shared(leaves: Mapping[Path, Any], model: Model, draft: Draft) -> None:
    """Refuses to adapt one use of a parameter that has several."""
    for path in leaves:
        if path in model.table.shared and path not in draft.tied:
            raise ValueError(
                f'{path!r} is used in several ways, such as embedding and head, and is adapted '
                'for all of them; this adapter adapts one. Give the head a parameter of its own '
                '(untie it) in params'
            )


def _token_ids(fields: Fields) -> dict[Names, tuple[int, ...]]:
    """Tokens by the module whose rows they are; of a list, any."""
    found = fields.value('trainable_token_indices', {})
    lists = found if isinstance(found, dict) else {'': found}
    for ids in lists.values():
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise fields.wrong('trainable_token_indices', 'lists of token ids', found)
    return {(module,) if module else (): tuple(ids) for module, ids in lists.items() if ids}
