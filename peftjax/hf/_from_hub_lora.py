"""From AdapterHub's `LoRAConfig`, which is its IA3 and DoRA too, to a plan."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from peftjax._types import Path
from peftjax.hf._config import Fields
from peftjax.hf._draft import Draft, adapted
from peftjax.hf._hub import UNSCALED
from peftjax.hf._model import Model
from peftjax.hf._plan import require
from peftjax.hf._stored import Stored
from peftjax.methods import Dora, Ia3, Lora

FUSED = 'c_attn'
"""GPT-2's query, key and value in one layer; AdapterHub adapts some of the three."""


def plan_hub_lora(fields: Fields, stored: Stored, model: Model, draft: Draft) -> None:
    """Adds what a `LoRAConfig` asks for to a draft."""
    fields.refuse(
        {
            'use_gating': 'a gate in place of the scale',
            'vera_b': 'VeRA',
            'vera_d': 'VeRA',
            'dtype': 'factors of another dtype',
        }
    )
    draft.note_idle(fields, ('init_weights',))
    scaling = fields.text('composition_mode', 'add') == 'scale'
    rank = fields.integer('r', 8)
    alpha = _alpha(fields, rank, stored, draft)
    suffix = '.ia3_l' if scaling else '.lora_A.weight'
    leaves = adapted(model, stored, {}, (suffix,), draft)
    parts = _parts(fields)
    _check_layers(fields, leaves, model)
    fused = [m for names in leaves.values() for m in names if m.endswith(f'.{FUSED}')]
    target = model.target(leaves)
    if scaling:
        if alpha != 1:
            raise ValueError(
                f'{fields.where}: alpha={alpha} cannot be represented with '
                "composition_mode='scale': outputs are multiplied with alpha beside the scale that "
                'was trained. Multiply the scales with it, and write alpha=1'
            )
        draft.rewrites += [_spread_scale(module, parts) for module in fused]
        draft.methods['ia3'] = Ia3(target=target)
        return
    wide: tuple[str, ...] = ()
    if _in_common(stored, fused, parts):
        draft.rewrites += [_one_pair(module, rank) for module in fused]
    elif fused:
        draft.rewrites += [_spread_pair(module, parts) for module in fused]
        wide = model.target(p for p, names in leaves.items() if names[0].endswith(f'.{FUSED}'))
    dora = fields.flag('use_dora')
    draft.methods['dora' if dora else 'lora'] = (Dora if dora else Lora)(
        target=target,
        rank=rank,
        alpha=alpha,
        dropout=fields.number('dropout', 0.0),
        ranks=tuple((pattern, rank * len(parts)) for pattern in wide),
        alphas=tuple((pattern, alpha * len(parts)) for pattern in wide),
    )
    if dora:
        for module in (m for names in leaves.values() for m in names):
            draft.rewrites.append(_decomposed(module, alpha / rank, model, draft))


def _alpha(fields: Fields, rank: int, stored: Stored, draft: Draft) -> float:
    """What was trained with, which is not what is written where the version had no scale."""
    alpha = fields.number('alpha', 8)
    version = Fields(stored.config, stored.where).text('version', '')
    # AdapterHub corrects a LoRA that stands alone; one in a union was trained so, too.
    if alpha == rank or not UNSCALED.match(version):
        return alpha
    draft.notes.append(
        f'{version} trained without the scale alpha / r, which newer versions have: the adapter is '
        f'loaded as it was trained, with alpha={rank} in place of {alpha}'
    )
    return rank


def _parts(fields: Fields) -> tuple[int, ...]:
    """Which of query, key and value are adapted."""
    names = fields.names('attn_matrices') or ('q', 'v')
    if not set(names) <= set('qkv'):
        raise fields.wrong('attn_matrices', "some of 'q', 'k' and 'v'", names)
    return tuple(i for i, name in enumerate('qkv') if name in names)


def _check_layers(fields: Fields, leaves: Mapping[Path, tuple[str, ...]], model: Model) -> None:
    """Every layer has what one of them has; there are as many kinds as the configuration says."""
    left_out = fields.integers('leave_out')
    modules = {module for names in leaves.values() for module in names}
    kinds = {_kind(module) for module in modules}
    wanted = [
        module
        for module, _ in model.table.adaptable()
        if _kind(module) in kinds and _layer(module) not in left_out
    ]
    require(wanted, modules, fields.where, 'factors for every layer')
    own = [fields.flag(key) for key in ('intermediate_lora', 'output_lora')]
    attention = len(fields.names('attn_matrices')) if fields.flag('selfattn_lora') else 0
    if any(kind.endswith(FUSED) for kind in kinds):
        attention = min(attention, 1)
    if len(kinds) != attention + sum(own):
        raise ValueError(
            f'{fields.where} asks for {attention + sum(own)} adapted weights in each layer; there '
            f'are {sorted(kinds)}. Take another copy'
        )


def _kind(module: str) -> str:
    return re.sub(r'\.\d+\.', '.*.', module)


def _layer(module: str) -> int | None:
    found = re.search(r'\.(\d+)\.', module)
    return int(found[1]) if found else None


def _spread_scale(module: str, parts: tuple[int, ...]) -> Any:
    """Scales of some of query, key and value to scales of all three."""
    name = f'{module}.ia3_l'

    def rewrite(tensors: dict[str, Any]) -> dict[str, Any]:
        given = jnp.reshape(tensors[name], (len(parts), -1, 1))
        whole = jnp.ones((3, *given.shape[1:]), given.dtype).at[jnp.asarray(parts)].set(given)
        return tensors | {name: whole.reshape(-1, 1)}

    return rewrite


def _in_common(stored: Stored, fused: list[str], parts: tuple[int, ...]) -> bool:
    """Whether query, key and value have all ranks in common, as where one pair was for all."""
    each = [stored.tensors[f'{module}.lora_A.weight'] for module in fused]
    if len(parts) < 3 or not all(len(a) % 3 == 0 for a in each):
        return False
    thirds = [a.reshape(3, -1, a.shape[1]) for a in each]
    return bool(each) and all((a == a[:1]).all() for a in thirds)


def _one_pair(module: str, rank: int) -> Any:
    """A pair that is written once for each of the three to the one that it was."""
    name = f'{module}.lora_A.weight'
    return lambda tensors: tensors | {name: tensors[name][:rank]}


def _spread_pair(module: str, parts: tuple[int, ...]) -> Any:
    """One pair for each of some of query, key and value to one pair of all their ranks."""
    name = f'{module}.lora_B.weight'

    def rewrite(tensors: dict[str, Any]) -> dict[str, Any]:
        given = jnp.asarray(tensors[name])
        blocks = given.reshape(len(parts), -1, given.shape[1])
        width, rank = blocks.shape[1:]
        whole = jnp.zeros((3 * width, len(parts) * rank), given.dtype)
        for i, part in enumerate(parts):
            rows = slice(part * width, (part + 1) * width)
            whole = whole.at[rows, i * rank : (i + 1) * rank].set(blocks[i])
        return tensors | {name: whole}

    return rewrite


def _decomposed(module: str, scale: float, model: Model, draft: Draft) -> Any:
    """AdapterHub computes `m / |w + ab| * (x w + bias + scale x ab)`; the paper, PEFT and we
    `m / |w + scale ab| * (x w + scale x ab) + bias`, the norm a constant. The one in terms of the
    other: a magnitude that holds the ratio of the norms, and a scaled bias.
    """
    w = model.value(f'{module}.weight')
    bias = model.value(f'{module}.bias') if model.place(f'{module}.bias') else None
    names = [f'{module}.{end}' for end in ('lora_A.weight', 'lora_B.weight')]
    magnitude = f'{module}.lora_magnitude_vector'
    if bias is not None:
        draft.saved.add(f'{module}.bias')

    def rewrite(tensors: dict[str, Any]) -> dict[str, Any]:
        a, b, m = (jnp.asarray(tensors[name]) for name in (*names, magnitude))
        gain = m.reshape(-1) / jnp.linalg.norm(w + b @ a, axis=1)
        norm = jax.lax.stop_gradient(jnp.linalg.norm(w + scale * (b @ a), axis=1))
        made = {magnitude: gain * norm}
        return tensors | made | ({} if bias is None else {f'{module}.bias': gain * bias})

    return rewrite
