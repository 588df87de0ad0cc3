"""The picture of `peftjax meta`: accuracy against steps on a task, a field for each shape."""

import pathlib
from collections.abc import Sequence
from typing import Any

STYLES = {False: '-', True: '--'}
"""Lines of a fresh phi and of a learned one."""


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
    names = list(dict.fromkeys(record['method'] for record in records))
    colors = {name: f'C{i % 10}' for i, name in enumerate(names)}
    for i, way in enumerate(ways):
        for j, shot in enumerate(shots):
            own = [one for one in records if (one['ways'], one['shots']) == (way, shot)]
            _field(fields[i, j], own, colors, f'{way} ways, {shot} shots')
    handles = {label: line for field in fields.flat
               for line, label in zip(*field.get_legend_handles_labels(), strict=True)}  # fmt: skip
    figure.legend(handles.values(), handles.keys(), loc='outside right upper', fontsize='small')
    figure.suptitle(title)
    figure.savefig(path)


def _field(
    axes: Any, records: Sequence[dict[str, Any]], colors: dict[str, str], title: str
) -> None:
    """One shape of tasks; what makes no steps is a level line."""
    last = max((record['steps'][-1] for record in records), default=0)
    for record in records:
        steps, means, spreads = (record[k] for k in ('steps', 'accuracy', 'interval'))
        if len(steps) == 1:
            steps, means, spreads = [0, last], means * 2, spreads * 2
        learned = record['meta'] is not None
        axes.errorbar(
            steps, means, yerr=spreads, label=record['method'], color=colors[record['method']],
            linestyle=STYLES[learned], marker='o', markersize=3, capsize=2, linewidth=1,
        )  # fmt: skip
    axes.set_xscale('symlog', linthresh=1)
    axes.set_xlim(left=-0.1)
    axes.set_xlabel('steps on a task')
    axes.set_ylabel('accuracy, %')
    axes.set_title(title)
    axes.grid(alpha=0.3)
