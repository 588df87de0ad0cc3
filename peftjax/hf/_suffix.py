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
    kinds = {path: kind(naming(path)) for path in every}
    others = {kinds[path] for path in kinds if path not in chosen}
    found: dict[str, None] = {}
    for path, modules in chosen.items():
        end = '' if kinds[path] in others else _shortest(kinds[path], others)
        found |= dict.fromkeys((end,) if end else modules)
    return sorted(found)


def kind(parameter: str) -> str:
    """The module of a parameter, all layers taken together: `h.#.attn.up`."""
    return re.sub(r'(?<=\.)(\d+|\{\})(?=\.)', '#', parameter).rpartition('.')[0]


def _shortest(module: str, others: set[str]) -> str:
    """The shortest end of a name with which no other name ends, or nothing."""
    parts = module.split('.')
    for count in range(1, len(parts) + 1):
        end = '.'.join(parts[-count:])
        if '#' in end:
            break
        if not any(f'.{other}'.endswith(f'.{end}') for other in others):
            return end
    return ''
