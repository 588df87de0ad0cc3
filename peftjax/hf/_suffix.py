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
      An end of the name for all layers together; full names where some layers are left out, or
      where no end without the number of the layer tells them from others.

    Example:
      >>> from peftjax.hf import hugging_face_name
      >>> paths = ['h/0/attn/up/kernel', 'h/0/mlp/up/kernel', 'h/0/mlp/down/kernel']
      >>> chosen = {path: (path[:-7].replace('/', '.'),) for path in paths[1:]}
      >>> suffixes(chosen, paths, hugging_face_name)
      ['down', 'mlp.up']
    """
    kinds = {path: together(naming(path)).rpartition('.')[0] for path in every}
    others = {kind for path, kind in kinds.items() if path not in chosen}
    mine: dict[str, tuple[str, ...]] = {}
    for path, modules in chosen.items():
        mine[kinds[path]] = (*mine.get(kinds[path], ()), *modules)
    return sorted({end for kind, names in mine.items() for end in ends(kind, names, others)})


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
