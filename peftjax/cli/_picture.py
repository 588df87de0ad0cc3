"""The picture of a comparison: accuracy against the number of trained parameters."""

import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels."""

POINT = 4.0
"""Half the width of a marker, with some air, in points."""


def draw(path: pathlib.Path, records: Sequence[dict[str, Any]], title: str) -> None:
    """Writes the picture; the number of trained parameters lies on a logarithmic axis.

    Args:
      path: of the PNG file.
      records: of the methods, as in `results.json`.
      title: above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for record, color in zip(records, _colors(), strict=False):
        x, y = record['trained_parameters'], record['accuracy_mean']
        axes.errorbar(x, y, yerr=record['accuracy_sd'], fmt='o', capsize=3, color=color)
    axes.set_xscale('log')
    counts = [record['trained_parameters'] for record in records]
    axes.set_xlim(min(counts) / 2.5, max(counts) * 2.5)
    axes.margins(y=0.12)
    axes.set_xlabel('trained parameters')
    axes.set_ylabel('accuracy on the test set, %')
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.draw_without_rendering()
    _label(axes, records)
    figure.savefig(path)


def _colors() -> Iterator[str]:
    return itertools.cycle(f'C{i}' for i in range(10))


def _label(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    """Names the points: each name goes to the nearest place where it covers nothing."""
    renderer = axes.figure.canvas.get_renderer()
    pixels = axes.figure.dpi / 72
    window = axes.get_window_extent(renderer)
    taken = [_mark(axes, record, pixels) for record in records]
    for record, color in zip(records, _colors(), strict=False):
        place = record['trained_parameters'], record['accuracy_mean']
        text = axes.annotate(
            record['method'],
            place,
            xytext=(0, 0),
            textcoords='offset points',
            ha='center',
            va='center',
            color=color,
            arrowprops={'arrowstyle': '-', 'color': color, 'alpha': 0.5, 'shrinkB': 3},
        )
        box = text.get_window_extent(renderer)
        size = (box.width / pixels, box.height / pixels)
        x, y = axes.transData.transform(place)
        for dx, dy in _offsets(*size):
            found = _around(x + dx * pixels, y + dy * pixels, box.width, box.height)
            inside = _contains((window.x0, window.y0, window.x1, window.y1), found)
            if inside and not any(_overlap(found, other) for other in taken):
                break
        text.set_position((dx, dy))
        taken.append(found)


def _offsets(width: float, height: float) -> list[tuple[float, float]]:
    """Places for a name of this size around its point, the nearest first."""
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    found = []
    for ring in range(8):
        for angle in angles:
            reach = POINT + 2 + ring * height * 0.7
            dx = np.cos(angle) * (reach + width / 2)
            dy = np.sin(angle) * (reach + height / 2)
            found.append((float(dx), float(dy)))
    return found


def _mark(axes: Any, record: dict[str, Any], pixels: float) -> Box:
    """The place that a point and its error bar take."""
    x, mean, spread = (record[k] for k in ('trained_parameters', 'accuracy_mean', 'accuracy_sd'))
    left, bottom = axes.transData.transform((x, mean - (spread or 0.0)))
    _, top = axes.transData.transform((x, mean + (spread or 0.0)))
    reach = POINT * pixels
    return left - reach, bottom - reach, left + reach, top + reach


def _around(x: float, y: float, width: float, height: float) -> Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _contains(outer: Box, inner: Box) -> bool:
    return all(o <= i for o, i in zip(outer[:2], inner[:2], strict=True)) and all(
        i <= o for o, i in zip(outer[2:], inner[2:], strict=True)
    )


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
