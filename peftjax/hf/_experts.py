"""Experts that are modules, and the parameters that transformers makes of them since version 5.

Checkpoints, and these names here, have `mlp.experts.3.gate_proj.weight` for each expert. In
transformers 5 all experts of a layer are parameters of one module, gate and up in one:
`mlp.experts.gate_up_proj: (experts, 2 * width, inputs)`, `mlp.experts.down_proj`. PEFT adapts them
by `target_parameters`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

EXPERT = re.compile(r'(?P<owner>(?:.*\.)?)(?:block_sparse_moe|mlp)\.experts\.(?P<index>\d+)'
                    r'\.(?P<module>\w+)')  # fmt: skip
FUSED = {
    'gate_up_proj': (('gate_proj', 'up_proj'), ('w1', 'w3')),
    'down_proj': (('down_proj',), ('w2',)),
}
"""Parameters, and the modules of an expert that each of them is made of, in order."""

ROLES = {module for choices in FUSED.values() for choice in choices for module in choice}

Parts = tuple[tuple[str, ...], ...]
"""For each part of a parameter, the modules of all experts."""


def renewed(module: str) -> str:
    """What transformers 5 calls a module of Mixtral."""
    return module.replace('.block_sparse_moe.', '.mlp.')


def is_expert(module: str) -> bool:
    """Whether a module is of an expert, and part of such a parameter."""
    found = EXPERT.fullmatch(module)
    return found is not None and found['module'] in ROLES


def fused(modules: Iterable[str]) -> dict[str, Parts]:
    """The parameters that experts among some modules make, those that are whole.

    Example:
      >>> fused(['mlp.experts.0.w1', 'mlp.experts.0.w3', 'mlp.experts.1.w1', 'mlp.experts.1.w3'])
      {'mlp.experts.gate_up_proj': (('mlp.experts.0.w1', 'mlp.experts.1.w1'),
      ('mlp.experts.0.w3', 'mlp.experts.1.w3'))}
    """
    owners: dict[str, dict[str, dict[int, str]]] = {}
    for module in modules:
        if found := EXPERT.fullmatch(module):
            mine = owners.setdefault(found['owner'], {}).setdefault(found['module'], {})
            mine[int(found['index'])] = module
    made: dict[str, Parts] = {}
    for owner, mine in owners.items():
        for name, choices in FUSED.items():
            for choice in choices:
                if all(module in mine for module in choice):
                    parts = tuple(_in_order(mine[module]) for module in choice)
                    made[f'{owner}mlp.experts.{name}'] = parts
    return made


def _in_order(experts: Mapping[int, str]) -> tuple[str, ...]:
    return tuple(experts[index] for index in sorted(experts))


def split(
    name: str, parts: Parts, widths: Sequence[int], tensors: Mapping[str, Any], apart: bool
) -> dict[str, Any]:
    """A pair of a fused parameter as pairs of the modules that it is made of; differentiable.

    Args:
      name: of the parameter.
      parts: it is made of.
      widths: the outputs of each part.
      tensors: `<name>.lora_A.weight: (experts * rank, in)`, the expert slowest, and
        `<name>.lora_B.weight: (out, rank * experts)`, the expert fastest.
      apart: each part has ranks of its own; otherwise it has all of them.
    """
    experts = len(parts[0])
    a, b = (tensors[f'{name}.lora_{x}.weight'] for x in 'AB')
    a, b = a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts)
    found, rows, rank = {}, 0, a.shape[1] // len(parts)
    for i, (part, width) in enumerate(zip(parts, widths, strict=True)):
        own = slice(i * rank, (i + 1) * rank) if apart else slice(None)
        for expert, module in enumerate(part):
            found[f'{module}.lora_A.weight'] = a[expert, own]
            found[f'{module}.lora_B.weight'] = b[rows : rows + width, own, expert]
        rows += width
    return found


def are_apart(b: np.ndarray, experts: int, widths: Sequence[int]) -> bool:
    """Whether each part of a fused parameter uses an equal share of the ranks, and no other."""
    b = b.reshape(b.shape[0], -1, experts)
    if len(widths) == 1 or b.shape[1] % len(widths):
        return False
    rank, rows = b.shape[1] // len(widths), np.cumsum([0, *widths])
    mine = np.zeros(b.shape[:2], bool)
    for i in range(len(widths)):
        mine[rows[i] : rows[i + 1], i * rank : (i + 1) * rank] = True
    return not b[~mine].any()


def in_common(parts: Parts, tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether the parts of a parameter have one and the same `lora_A`."""
    a = lambda module: tensors[f'{module}.lora_A.weight']
    first, *others = parts
    pairs = (pair for part in others for pair in zip(first, part, strict=True))
    return all(np.array_equal(a(one), a(other)) for one, other in pairs)


def join(
    name: str, parts: Parts, tensors: Mapping[str, np.ndarray], apart: bool
) -> dict[str, np.ndarray]:
    """The way back: pairs of modules as one pair of the parameter that they make.

    Args:
      name: of the parameter.
      parts: it is made of, all of one rank.
      tensors: with the pairs of their modules.
      apart: as of `split`; where each part has all ranks, their `lora_A` are one and the same.
    """
    stack = lambda part, x, axis: np.stack([tensors[f'{m}.lora_{x}.weight'] for m in part], axis)
    a = [stack(part, 'A', 0) for part in parts]  # (experts, rank, in)
    b = [stack(part, 'B', 2) for part in parts]  # (out, rank, experts)
    if apart:
        rank, count = a[0].shape[1], len(parts)
        room = [(i * rank, (count - 1 - i) * rank) for i in range(count)]
        b = [np.pad(one, ((0, 0), beside, (0, 0))) for one, beside in zip(b, room, strict=True)]
    whole_a, whole_b = np.concatenate(a if apart else a[:1], axis=1), np.concatenate(b)
    return {
        f'{name}.lora_A.weight': whole_a.reshape(-1, whole_a.shape[-1]),
        f'{name}.lora_B.weight': whole_b.reshape(len(whole_b), -1),
    }
