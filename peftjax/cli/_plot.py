"""The picture of a run: its losses against its steps."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

FILE = 'loss.png'


def draw(path: pathlib.Path, rows: Sequence[dict[str, Any]], title: str, per: str) -> None:
    """Writes the picture.

    Args:
      path: of the PNG file.
      rows: as in `metrics.jsonl`, at least one with a loss.
      title: above the picture.
      per: what a loss is the mean of.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = column(rows, 'loss')
    width = max(1, len(losses) // 25)
    axes.plot(steps, losses, color='C0', alpha=0.3 if width > 1 else 1.0, label='training')
    if width > 1:
        axes.plot(steps[width - 1 :], smooth(losses, width), color='C0', label=f'mean of {width}')
    places, held = column(rows, 'evaluation_loss')
    if len(held):
        axes.plot(places, held, 'o-', color='C1', label='evaluation')
    axes.set_xlabel('step')
    axes.set_ylabel(f'loss per {per}, nats')
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def column(rows: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps at which a value is known, and the values."""
    found = [(row['step'], row[name]) for row in rows if name in row]
    steps, values = np.array(found, float).reshape(-1, 2).T
    return steps, values


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Means of neighbors."""
    return np.convolve(values, np.full(width, 1 / width), 'valid')
