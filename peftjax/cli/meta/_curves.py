"""The picture of `peftjax meta`: accuracy against steps on a task, a field for each shape."""

import pathlib
from collections.abc import Sequence
from typing import Any

STYLES = {False: '-', True: '--'}
"""Lines of a fresh phi and of a learned one."""

COLORS, COUNT = 'tab20', 20
"""A map of so many colors: by turns a strong one and its pale one."""

SPREAD = 0.6
"""How far apart the first and the last method stand after one number of steps, so that their
intervals do not lie on each other; numbers of steps are 1 apart."""


def draw(path: pathlib.Path, records: Sequence[dict[str, Any]], title: str) -> None:
    """Writes the picture; shapes of tasks stand in rows by ways and in columns by shots.

    Args:
      path: of the PNG file.
      records: as in `results.json`.
      title: above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ways = sorted({record['ways'] for record in records})
    shots = sorted({record['shots'] for record in records})
    size = (1.5 + 4.5 * len(shots), 1.5 + 3.5 * len(ways))
    figure = Figure(figsize=size, dpi=150, layout='constrained')
    FigureCanvasAgg(figure)
    fields = figure.subplots(len(ways), len(shots), squeeze=False)
    looks = _looks(list(dict.fromkeys(record['method'] for record in records)))
    for i, way in enumerate(ways):
        for j, shot in enumerate(shots):
            own = [one for one in records if (one['ways'], one['shots']) == (way, shot)]
            _field(fields[i, j], own, looks, f'{way} ways, {shot} shot{"s" * (shot > 1)}')
    handles = {label: line for field in fields.flat
               for line, label in zip(*field.get_legend_handles_labels(), strict=True)}  # fmt: skip
    figure.legend(handles.values(), handles.keys(), loc='outside right upper', fontsize='small')
    figure.suptitle(title)
    figure.savefig(path)


def _looks(names: Sequence[str]) -> dict[str, tuple[Any, float]]:
    """The color of each method, and how far from the others it stands."""
    from matplotlib import colormaps

    strong_first = *range(0, COUNT, 2), *range(1, COUNT, 2)
    colors = [colormaps[COLORS](i) for i in strong_first]
    middle = (len(names) - 1) / 2
    apart = SPREAD / max(1, len(names) - 1)
    return {name: (colors[i % COUNT], (i - middle) * apart) for i, name in enumerate(names)}


def _field(
    axes: Any,
    records: Sequence[dict[str, Any]],
    looks: dict[str, tuple[Any, float]],
    title: str,
) -> None:
    """One shape of tasks; what makes no steps stands at the left, a level line goes on from it."""
    steps = sorted({step for record in records if _moves(record) for step in record['steps']})
    for record in records:
        color, aside = looks[record['method']]
        places = [steps.index(step) for step in record['steps']] if _moves(record) else [-1]
        axes.errorbar(
            [place + aside for place in places], record['accuracy'], yerr=_bars(record),
            label=record['method'], color=color, linestyle=STYLES[record['meta'] is not None],
            marker='o', markersize=3, capsize=2, linewidth=1,
        )  # fmt: skip
        if not _moves(record) and steps:
            level = record['accuracy'] * 2
            axes.plot([aside - 1, len(steps) - 0.5], level, color=color, alpha=0.4, linewidth=0.8)
    axes.set_xticks(range(-1, len(steps)), ['no steps', *steps])
    axes.set_xlabel('steps on a task')
    axes.set_ylabel('accuracy, %')
    axes.set_title(title)
    axes.grid(axis='y', alpha=0.3)


def _moves(record: dict[str, Any]) -> bool:
    """Whether a method makes steps."""
    return record['steps'] != [0]


def _bars(record: dict[str, Any]) -> list[float] | None:
    """Half the intervals; a single task has none."""
    return None if None in record['interval'] else record['interval']
