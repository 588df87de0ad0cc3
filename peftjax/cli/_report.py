"""What a comparison leaves: a table, a picture, a JSON file."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

HEAD = (
    'method', 'trained', '% of model', 'on disk', 'train s', 'steps/s', 'peak', 'accuracy',
)  # fmt: skip


def row(record: dict[str, Any]) -> tuple[str, ...]:
    """One method as text."""
    steps = record['steps'] / record['train_seconds'] if record['steps'] else None
    spread = f' ± {record["accuracy_sd"]:.1f}' if record['accuracy_sd'] is not None else ''
    return (
        record['method'],
        f'{record["trained_parameters"]:,}',
        f'{record["trained_percent"]:.3g}',
        size(record['bytes_on_disk']),
        f'{record["train_seconds"]:.1f}',
        '-' if steps is None else f'{steps:.1f}',
        size(record['peak_bytes']),
        f'{record["accuracy_mean"]:.1f}{spread}',
    )


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ('B', 'kB', 'MB', 'GB'):
        if count < 1000 or unit == 'GB':
            return f'{count:.3g} {unit}'
        count /= 1000
    raise AssertionError


def table(records: Sequence[dict[str, Any]]) -> str:
    """All methods as text in columns, numbers to the right."""
    rows = [HEAD, *(row(record) for record in records)]
    widths = [max(len(line[c]) for line in rows) for c in range(len(HEAD))]
    pad = lambda text, c: text.ljust(widths[c]) if c == 0 else text.rjust(widths[c])
    lines = ['  '.join(pad(text, c) for c, text in enumerate(line)).rstrip() for line in rows]
    return '\n'.join([lines[0], '-' * len(lines[0]), *lines[1:]])


def summary(accuracies: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample deviation, in percent."""
    values = 100 * np.asarray(accuracies)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes a JSON file."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


def picture(path: pathlib.Path, records: Sequence[dict[str, Any]], title: str) -> None:
    """Accuracy against the number of trained parameters, which lie on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, record in enumerate(records):
        x, y = record['trained_parameters'], record['accuracy_mean']
        spread = record['accuracy_sd'] or 0.0
        color = f'C{i % 10}'
        axes.errorbar(x, y, yerr=spread, fmt='o', capsize=3, color=color)
        above = 6 if i % 2 else -12
        axes.annotate(
            record['method'], (x, y), xytext=(6, above), textcoords='offset points', color=color
        )
    axes.set_xscale('log')
    most = max(record['trained_parameters'] for record in records)
    least = min(record['trained_parameters'] for record in records)
    axes.set_xlim(least / 2, 10 ** (math.log10(most) + 0.5))
    axes.set_xlabel('trained parameters')
    axes.set_ylabel('accuracy on the test set, %')
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.savefig(path)
