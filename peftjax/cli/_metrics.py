"""What is measured while a run goes on, written at once: a run cut off keeps it."""

import importlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from peftjax.cli import _whole

FILE = 'metrics.jsonl'
BOARD = 'tensorboard'


class Metrics:
    """A file with a line of JSON for each step and each evaluation, and TensorBoard if asked.

    Args:
      out: the folder of the run, which is there; None writes nothing.
      board: as from `board`, or None.
      after: the step that a run goes on from: what is in the file up to there stays. None begins
        the file.

    Attributes:
      rows: all that was written.
    """

    def __init__(self, out: pathlib.Path | None, board: Any = None, after: int | None = None):
        self.rows: list[dict[str, Any]] = []
        self._file = self._board = None
        if out is None:
            return
        path = out / FILE
        if after is not None:
            self.rows = [row for row in _read(path) if row['step'] <= after]
        _whole.write(path, ''.join(f'{json.dumps(row)}\n' for row in self.rows))
        self._file = path.open('a', encoding='utf-8', buffering=1)
        again = {} if after is None else {'purge_step': after + 1}
        self._board = None if board is None else board(str(out / BOARD), **again)

    def __enter__(self) -> 'Metrics':
        """Itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes what is open."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes what is known after so many steps."""
        self.rows.append({'step': step, **values})
        if self._file is not None:
            self._file.write(json.dumps(self.rows[-1]) + '\n')
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a file, up to one that was cut off."""
    rows = []
    for line in path.read_text(encoding='utf-8').splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def board() -> Any:
    """What makes a writer for TensorBoard of a folder.

    Raises:
      ValueError: the package is not installed.
    """
    try:
        found = importlib.import_module('tensorboardX')
    except ImportError as error:
        raise ValueError(
            "--tensorboard needs tensorboardX: pip install 'peftjax[tensorboard]'"
        ) from error
    return found.SummaryWriter
