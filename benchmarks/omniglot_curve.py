"""What is told of a run: JSON lines that go on with it, and a row in the table of results."""

import json
import os
import pathlib
import time
from typing import Any

Row = dict[str, Any]


class Curve:
    """Rows by step: loss and time of a step since the row before, seconds of training, accuracies.

    What an earlier piece of the run wrote after the step that is gone on from is left out, for
    those steps are made again.

    Args:
      path: of the file.
      step: where the run stands.
    """

    def __init__(self, path: pathlib.Path, step: int):
        self._path, found = path, _rows(path)
        self.rows = [row for row in found if row['step'] <= step]
        if len(self.rows) < len(found):
            _whole(path, ''.join(json.dumps(row) + '\n' for row in self.rows))
        trained = [row for row in self.rows if 'seconds' in row]
        self._before = trained[-1]['seconds'] if trained else 0.0
        self._seconds, self._step = self._before, step
        self._losses: list[float] = []
        self._warm = False
        self.go_on()

    def loss(self, step: int, loss: float) -> None:
        """Takes note of the loss of a step."""
        del step
        self._losses.append(loss)

    def pause(self) -> None:
        """What follows is no training."""
        self._before += time.perf_counter() - self._since
        self._since = time.perf_counter()

    def go_on(self) -> None:
        """What follows is training."""
        self._since = time.perf_counter()

    def point(self, step: int, **more: Any) -> None:
        """Writes a row; training is paused."""
        if step > self._step:
            took = (self._before - self._seconds) / (step - self._step)
            more['loss'] = round(sum(self._losses) / max(len(self._losses), 1), 5)
            more['seconds'] = round(self._before, 2)
            if self._warm:  # a piece begins with compiling
                more['step_ms'] = round(1000 * took, 1)
            self._warm = True
        self._seconds, self._step, self._losses = self._before, step, []
        self.note({'step': step, **more})

    def note(self, row: Row) -> None:
        """Writes a row as it is."""
        self.rows.append(row)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open('a', encoding='utf-8') as file:
            file.write(json.dumps(row) + '\n')

    def test(self, step: int) -> Row | None:
        """The test after this step, where it was made."""
        made = [row for row in self.rows if row['step'] == step and 'test' in row]
        return made[-1] if made else None


def record(path: pathlib.Path, row: Row, same: tuple[str, ...]) -> None:
    """Puts a row into the table of results, in place of the one of the same run."""
    rows = json.loads(path.read_text(encoding='utf-8')) if path.exists() else []
    named = lambda row: [row[name] for name in same]
    rows = [old for old in rows if named(old) != named(row)] + [row]
    rows.sort(key=lambda row: json.dumps(named(row)))
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ',\n'.join(json.dumps(row) for row in rows)
    _whole(path, f'[\n{lines}\n]\n')


def _rows(path: pathlib.Path) -> list[Row]:
    """The rows of a file; a last line that was cut off is none."""
    if not path.exists():
        return []
    lines = path.read_text(encoding='utf-8').split('\n')
    return [json.loads(line) for line in lines[:-1]]


def _whole(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    new = path.with_name(path.name + '.new')
    new.write_text(text, encoding='utf-8')
    os.replace(new, path)
