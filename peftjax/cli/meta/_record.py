"""What `peftjax meta` says of one method on tasks of one shape."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from peftjax.cli import _report

NORMAL = 1.96
"""So many standard errors to each side hold the mean in 95 of 100 cases."""


def interval(accuracies: np.ndarray) -> list[float] | list[None]:
    """Half the width of the 95 % confidence interval of each mean over tasks `(tasks, steps)`."""
    count = len(accuracies)
    if count < 2:
        return [None] * accuracies.shape[1]
    errors = accuracies.std(0, ddof=1) / np.sqrt(count)
    return [round(float(NORMAL * error), 3) for error in errors]


def means(accuracies: np.ndarray) -> list[float]:
    """Means over tasks `(tasks, steps)`."""
    return [round(float(mean), 3) for mean in accuracies.mean(0)]


def key(record: dict[str, Any]) -> tuple[str, int, int]:
    """What there is one record of."""
    return record['method'], record['ways'], record['shots']


def line(record: dict[str, Any]) -> str:
    """A record as one line."""
    shape = f'{record["ways"]} ways, {record["shots"]} shots'
    return f'{record["method"]:23}{shape:20}' + '  '.join(_cells(record, record['steps']))


def table(records: Sequence[dict[str, Any]]) -> str:
    """All records in columns, shape by shape."""
    parts = []
    for ways, shots in sorted({(record['ways'], record['shots']) for record in records}):
        own = [one for one in records if (one['ways'], one['shots']) == (ways, shots)]
        steps = sorted({step for record in own for step in record['steps']})
        head = [
            'method',
            'phi',
            *(f'{step} steps' for step in steps),
            'ms a step',
            'meta s',
            'peak',
        ]
        rows = [head, *(_row(record, steps) for record in own)]
        parts.append(columns(f'{ways} ways, {shots} shots: accuracy in %, ± 95 % confidence', rows))
    return '\n\n'.join(parts)


def columns(title: str, rows: Sequence[Sequence[str]]) -> str:
    """Rows below each other, the first of them as their head."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = [_padded(row, widths) for row in rows]
    return '\n'.join([title, lines[0], '-' * len(lines[0]), *lines[1:]])


def _padded(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(row, widths, strict=True)
    return '  '.join([first[0].ljust(first[1]), *(text.rjust(w) for text, w in others)]).rstrip()


def _row(record: dict[str, Any], steps: Sequence[int]) -> list[str]:
    took, learned = record['milliseconds'], (record['meta'] or {}).get('seconds')
    return [
        record['method'],
        f'{record["phi_parameters"]:,}',
        *_cells(record, steps),
        '-' if took is None else f'{took:.3g}',
        '-' if learned is None else f'{learned:.0f}',
        _report.size(record['peak_bytes']),
    ]


def _cells(record: dict[str, Any], steps: Sequence[int]) -> list[str]:
    found = dict(zip(record['steps'], zip(record['accuracy'], record['interval'], strict=True),
                     strict=True))  # fmt: skip
    return [cell(*found[step]) if step in found else '-' for step in steps]


def cell(mean: float, half: float | None, sign: Literal['-', '+'] = '-') -> str:
    """A mean and half its interval; `+` gives every mean its sign."""
    return f'{mean:{sign}.1f}' + ('' if half is None else f' ± {half:.1f}')
