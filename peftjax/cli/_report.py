"""What a comparison says: a table and a JSON file."""

import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np

from peftjax._version import __version__
from peftjax.cli import _whole

HEAD = (
    'method', 'trained', '% of model', 'on disk', 'train s', 'steps/s', 'peak', 'accuracy',
)  # fmt: skip


def line(record: dict[str, Any]) -> str:
    """The method and its accuracy."""
    return f'{record["method"]:10}{row(record)[-1]}'


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
        if count < 999.5 or unit == 'GB':
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
    """Mean and sample deviation; one value has none."""
    spread = float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None
    return float(np.mean(accuracies)), spread


def versions() -> dict[str, str]:
    """What the figures were made with."""
    import jax

    found = {name: importlib.metadata.version(name) for name in ('jax', 'flax', 'optax')}
    return {
        'peftjax': __version__,
        'python': platform.python_version(),
        **found,
        'device': jax.devices()[0].device_kind,
    }


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes a JSON file."""
    _whole.write(path, json.dumps(content, indent=2, ensure_ascii=False) + '\n')
