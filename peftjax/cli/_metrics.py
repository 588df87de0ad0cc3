"""What is measured while a run goes on, written at once: a run cut off keeps it."""

import importlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

FILE = 'metrics.jsonl'
BOARD = 'tensorboard'


class Metrics:
    """A file with a line of JSON for each step and each evaluation, and TensorBoard if asked.

    Args:
      out: the folder of the run, which is there.
      board: as from `board`, or None.

    Attributes:
      rows: all that was written.
    """

    def __init__(self, out: pathlib.Path, board: Any = None):
        self.rows: list[dict[str, Any]] = []
        self._file = (out / FILE).open('w', encoding='utf-8', buffering=1)
        self._board = None if board is None else board(str(out / BOARD))

    def __enter__(self) -> 'Metrics':
        """Itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes what is open."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes what is known after so many steps."""
        self.rows.append({'step': step, **values})
        self._file.write(json.dumps(self.rows[-1]) + '\n')
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)


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
