"""How much better a method is than another on the same tasks, step by step.

Tasks differ more than methods do. Differences are taken task by task, so that what makes a task
easy or hard for both falls out of their interval.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peftjax.cli.meta import _record
from peftjax.cli.meta._methods import LEARNED

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


def beside_fresh(records: Sequence[dict[str, Any]], tasks: Tasks) -> list[dict[str, Any]]:
    """Every method beside fresh LoRA, where both were judged on the same tasks.

    Args:
      records: as in `results.json`.
      tasks: accuracies on each task of all of them.

    Returns:
      For each record but those of fresh LoRA its method and shape, and after each number of steps
      the difference and half its interval. A method that makes no steps is compared, as it is, with
      LoRA after all of LoRA's.
    """
    steps = {_record.key(record): record['steps'] for record in records}
    found = []
    for mine in steps:
        method, ways, shots = mine
        fresh = LEARNED, ways, shots
        if method == LEARNED or fresh not in steps:
            continue
        one, other, common = tasks[mine], tasks[fresh], steps[fresh]
        if steps[mine] == [0]:
            one = np.broadcast_to(one, other.shape)
        else:
            common = [step for step in common if step in steps[mine]]
            one = one[:, [steps[mine].index(step) for step in common]]
            other = other[:, [steps[fresh].index(step) for step in common]]
        means, halves = difference(one, other)
        said = {'method': method, 'ways': ways, 'shots': shots, 'steps': common}
        found.append(said | {'difference': means, 'interval': halves})
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """What `beside_fresh` found in columns, shape by shape."""
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
        title = f'{ways} ways, {shots} shots: points above fresh LoRA on the same tasks, ± 95 %'
        parts.append(_record.columns(title, rows))
    return '\n\n'.join(parts)
