"""Draws how far runs of `omniglot.py` went: accuracy on validation tasks against outer steps.

    python benchmarks/omniglot_picture.py [--results table.json] [--out picture.png]

A field for each number of ways, a line for each algorithm; the accuracy on test tasks, which are of
other alphabets, stands beside the names.
"""

import argparse
import json
import pathlib
from typing import Any

from matplotlib.figure import Figure
from omniglot import RESULTS
from omniglot_recipes import ALGORITHMS


def main() -> None:
    parser = argparse.ArgumentParser(description='curves of Omniglot')
    parser.add_argument('--results', type=pathlib.Path, default=RESULTS, help='the table')
    parser.add_argument('--out', type=pathlib.Path, default=RESULTS.with_suffix('.png'))
    options = parser.parse_args()
    draw(options.out, json.loads(options.results.read_text(encoding='utf-8')))


def draw(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Writes the picture.

    Args:
      path: of the PNG file.
      rows: of the table of results; a run that was not validated has no line.
    """
    rows = [row for row in rows if row['curve']]
    shapes = sorted({(row['ways'], row['shots']) for row in rows})
    figure = Figure(figsize=(5.5 * len(shapes), 4.5), dpi=150, layout='constrained')
    fields = figure.subplots(1, len(shapes), squeeze=False)[0]
    for axes, (ways, shots) in zip(fields, shapes, strict=True):
        own = [row for row in rows if (row['ways'], row['shots']) == (ways, shots)]
        for row in sorted(own, key=lambda row: -row['accuracy']):
            steps, _, accuracy = zip(*row['curve'], strict=True)
            axes.plot(
                steps, accuracy, label=_named(row), color=f'C{ALGORITHMS.index(row["algorithm"])}',
                marker='o', markersize=2, linewidth=1,
            )  # fmt: skip
        axes.set_xscale('log')
        axes.set_xlabel('outer steps')
        axes.set_ylabel('accuracy on validation tasks, %')
        axes.set_title(f'{ways} ways, {shots} shot{"s" * (shots > 1)}')
        axes.grid(alpha=0.3)
        axes.legend(title='on test tasks', fontsize='small')
    figure.savefig(path)


def _named(row: dict[str, Any]) -> str:
    """The algorithm, and how it did."""
    return f'{row["algorithm"]}: {row["accuracy"]:.1f} ± {row["interval"]:.1f}'


if __name__ == '__main__':
    main()
