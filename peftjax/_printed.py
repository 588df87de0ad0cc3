"""A plan as people read it: what is adapted, at which shapes, on which path through the engine."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from peftjax._sites import table
from peftjax._types import Path

if TYPE_CHECKING:
    from peftjax._peft import Peft

HEAD = ('method', 'path', 'kind', 'weight', 'phi', 'count', 'path taken')


def printed(peft: 'Peft') -> str:
    """A row for each site, the total, and what a target finds but a method passes over."""
    total = sum(math.prod(shape) for _, shape, _ in peft.leaves)
    trained = f'{peft.count():,} trained, {100 * peft.count() / total:.3g} % of {total:,}'
    text = f'{table(HEAD, list(_rows(peft)))}\ntotal: {trained}'
    early = (f'dequantized before its use: {p} ({", ".join(why)})' for p, why in peft.early)
    return '\n'.join([text, *_passed_over(peft), *early])


def _rows(peft: 'Peft') -> Iterator[tuple[str, ...]]:
    served = dict(peft.served)
    for (keys, part), chosen in zip(peft.method.parts, peft.sites, strict=True):
        for site in chosen:
            prefix = '/'.join((*keys, site.path)) + '/'
            mine = [own for own in peft.phi if own[0].startswith(prefix)]
            shapes = ', '.join(f'{p[len(prefix) :]} {_text(shape)}' for p, shape, _ in mine)
            count = sum(math.prod(shape) for _, shape, _ in mine)
            taken = ', '.join(served.get(site.path, ('efficient',)))
            name = type(part).__name__
            yield name, site.path, site.kind, _text(site.shape), shapes, f'{count:,}', taken


def _passed_over(peft: 'Peft') -> Iterator[str]:
    """A line for each part whose target finds more than it adapts."""
    for (_, part), passed in zip(peft.method.parts, peft.passed, strict=False):
        kinds: dict[str, list[Path]] = {}
        for path, kind in passed:
            kinds.setdefault(kind, []).append(path)
        if kinds:
            found = ', '.join(f'{len(p)} {kind} ({p[0]}{" …" * (len(p) > 1)})'
                              for kind, p in kinds.items())  # fmt: skip
            yield f'{type(part).__name__} passes over what its target finds: {found}'


def _text(shape: Sequence[int]) -> str:
    return '×'.join(map(str, shape))
