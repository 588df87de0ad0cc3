"""How much better a method is than another on the same tasks, step by step.

Tasks differ more than methods do. Differences are taken task by task, so that what makes a task
easy or hard for both falls out of their interval.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peftjax.cli.meta import _record

Tasks = Mapping[tuple[str, int, int], np.ndarray]
"""Accuracies `(tasks, steps)` of each record, by its key."""


def difference(one: np.ndarray, other: np.ndarray) -> tuple[list[float], list[float] | list[None]]:
    """By how much one method is better than another.

    Args:
      one: accuracies in percent `(tasks, steps)`.
      other: those of the other method on the same tasks after the same steps.

    Returns:
      For each number of steps the mean difference, and half the width of its 95 % confidence
      interval, None for a single task.

    Example:
      >>> difference(np.array([[71.0], [91.0]]), np.array([[70.0], [90.0]]))
      ([1.0], [0.0])
    """
    each = one.astype(np.float64) - other
    return _record.means(each), _record.interval(each)


def beside(
    names: Sequence[str], records: Sequence[dict[str, Any]], tasks: Tasks
) -> dict[str, list[dict[str, Any]]]:
    """Every method beside some, where both were judged on the same tasks.

    Args:
      names: of the methods that others stand beside.
      records: as in `results.json`.
      tasks: accuracies on each task of all of them.

    Returns:
      For each name, and each record of another method on tasks of a shape that both have: the
      record's method and shape, and after each number of steps that both were judged after the
      difference and half its interval. A method that makes no steps stands, as it is, beside the
      other after all of its steps.
    """
    return {name: _beside(name, records, tasks) for name in names}


def _beside(name: str, records: Sequence[dict[str, Any]], tasks: Tasks) -> list[dict[str, Any]]:
    steps = {_record.key(record): record['steps'] for record in records}
    found = []
    for mine in steps:
        method, ways, shots = mine
        theirs = name, ways, shots
        if method == name or theirs not in steps:
            continue
        common = _common(steps[mine], steps[theirs])
        one, other = (_after(common, steps[key], tasks[key]) for key in (mine, theirs))
        means, halves = difference(one, other)
        said = {'method': method, 'ways': ways, 'shots': shots, 'steps': common}
        found.append(said | {'difference': means, 'interval': halves})
    return found


def _common(mine: list[int], theirs: list[int]) -> list[int]:
    """The steps that two methods are compared after; `[0]` is one that makes none."""
    if mine == [0]:
        return theirs
    if theirs == [0]:
        return mine
    return [step for step in mine if step in theirs]


def _after(common: list[int], steps: list[int], accuracies: np.ndarray) -> np.ndarray:
    """Accuracies `(tasks, steps)` after these steps; of what makes none always the same."""
    places = [0 if steps == [0] else steps.index(step) for step in common]
    return accuracies[:, places]


def text(beside: dict[str, list[dict[str, Any]]]) -> str:
    """What `beside` found in columns, shape by shape."""
    return '\n\n'.join(table for name, found in beside.items() for table in _tables(name, found))


def _tables(name: str, found: Sequence[dict[str, Any]]) -> list[str]:
    parts = []
    for ways, shots in sorted({(one['ways'], one['shots']) for one in found}):
        own = [one for one in found if (one['ways'], one['shots']) == (ways, shots)]
        steps = sorted({step for one in own for step in one['steps']})
        rows = [['method', *(f'{step} steps' for step in steps)]]
        for one in own:
            cells = zip(one['difference'], one['interval'], strict=True)
            said = dict(zip(one['steps'], cells, strict=True))
            known = [_record.cell(*said[step], '+') if step in said else '-' for step in steps]
            rows.append([one['method'], *known])
        title = f'{ways} ways, {shots} shots: points above {name} on the same tasks, ± 95 %'
        parts.append(_record.columns(title, rows))
    return parts
