"""The shortest names by which PEFT finds some modules and no other: `target_modules` and so on."""

import re
from collections.abc import Iterable, Mapping

from peftjax._types import Path
from peftjax.hf._names import Naming


def suffixes(
    chosen: Mapping[Path, tuple[str, ...]], every: Iterable[Path], naming: Naming
) -> list[str]:
    """Ends of names that belong to the chosen modules alone.

    Args:
      chosen: paths of weights, each with the stored names of its modules.
      every: the paths from which they are told.
      naming: from paths to names.

    Returns:
      An end of the name for all layers together, of two parts where several kinds of modules have
      the last one; full names where some layers are left out, or where no end without the number of
      the layer tells them from others.

    Example:
      >>> from peftjax.hf import hugging_face_name
      >>> paths = ['h/0/attn/up/kernel', 'h/0/mlp/up/kernel', 'h/0/mlp/down/kernel']
      >>> chosen = {path: (path[:-7].replace('/', '.'),) for path in paths[1:]}
      >>> suffixes(chosen, paths, hugging_face_name)
      ['down', 'mlp.up']
      >>> chosen = {path: (path[:-7].replace('/', '.'),) for path in paths}
      >>> suffixes(chosen, paths, hugging_face_name)
      ['attn.up', 'down', 'mlp.up']
    """
    kinds = {path: together(naming(path)).rpartition('.')[0] for path in every}
    others = {kind for path, kind in kinds.items() if path not in chosen}
    mine: dict[str, tuple[str, ...]] = {}
    for path, modules in chosen.items():
        mine[kinds[path]] = (*mine.get(kinds[path], ()), *modules)
    found = (ends(k, names, others, _least(k, kinds.values())) for k, names in mine.items())
    return sorted({end for several in found for end in several})


def _least(kind: str, every: Iterable[str]) -> int:
    """How many parts the end of a name needs.

    What several kinds of modules are called, others may be called too which the Hugging Face model
    has and ours has not: BERT's layers have a `dense`, and so has its pooler. In a layer the module
    that holds it tells them apart.
    """
    owner, _, last = kind.rpartition('.')
    alike = {other for other in every if other.rpartition('.')[2] == last}
    return 2 if len(alike) > 1 and owner and not owner.endswith('#') else 1


def ends(kind: str, names: tuple[str, ...], others: set[str], least: int = 1) -> tuple[str, ...]:
    """The end of a name that is alike in all layers, or all the names where there is none.

    Args:
      kind: the name, all layers taken together.
      names: in each layer.
      others: from which it is told.
      least: how many parts of the name the end must have.
    """
    parts = kind.split('.')
    for count in range(least, len(parts) + 1) if kind not in others else ():
        end = '.'.join(parts[-count:])
        if '#' in end:
            break
        if not any(f'.{other}'.endswith(f'.{end}') for other in others):
            return (end,)
    return names


def together(name: str) -> str:
    """A name, all layers taken together: `h.#.attn.up`."""
    return re.sub(r'(?<=\.)(\d+|\{\})(?=\.)', '#', name)
