"""Accuracies of batches of tasks, of a result that is not whole: what is cut off goes on there."""

import json
import pathlib
from typing import Any

import numpy as np

FILE = 'parts.jsonl'


class Parts:
    """A file of batches, in the order in which they were adapted to.

    Args:
      path: of the file; it need not be there.
      made: what a batch depends on beside options, such as texts and versions. Batches of something
        else are left out.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     for accuracy in (50.0, 75.0):
      ...         parts = Parts(pathlib.Path(folder) / FILE, {'jax': '1'})
      ...         parts.add('lora', np.array([[accuracy]], np.float32))
      ...     [float(batch[0, 0]) for batch in parts.of('lora')], parts.of('full')
      ([50.0, 75.0], [])
    """

    def __init__(self, path: pathlib.Path, made: dict[str, Any]):
        self._path, self._made = path, made
        self._rows: dict[tuple[str, int], np.ndarray] = {}
        lines = path.read_text(encoding='utf-8').splitlines() if path.is_file() else []
        found = [row for line in lines if (row := _read(line)) is not None]
        if found and found[0] == made:
            # by its number: another process in the same folder writes the same once more
            self._rows = {
                (row['of'], row['batch']): np.array(row['accuracy'], np.float32)
                for row in found[1:]
            }
        self._begun = False

    def of(self, name: str) -> list[np.ndarray]:
        """The batches of one name, `(rates, tasks, steps)` each."""
        found: list[np.ndarray] = []
        while (name, len(found)) in self._rows:
            found.append(self._rows[name, len(found)])
        return found

    def add(self, name: str, batch: np.ndarray) -> None:
        """One more, which is on disk after it."""
        new = {(name, len(self.of(name))): batch}
        self._rows |= new
        if not self._begun:  # without what was cut off in the middle of a line
            self._path.write_text(json.dumps(self._made) + '\n', encoding='utf-8')
            new, self._begun = self._rows, True
        with self._path.open('a', encoding='utf-8') as file:
            for (other, number), one in new.items():
                row = {'of': other, 'batch': number, 'accuracy': one.tolist()}
                file.write(json.dumps(row) + '\n')

    def clear(self) -> None:
        """Forgets all: the result is whole."""
        self._rows, self._begun = {}, False
        self._path.unlink(missing_ok=True)


def _read(line: str) -> Any:
    """What a line says; nothing where it was cut off, or two were written into each other."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
