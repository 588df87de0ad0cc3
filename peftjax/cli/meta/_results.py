"""The folder that `peftjax meta` fills, method by method, and goes on with."""

import argparse
import json
import pathlib
import re
import shutil
from typing import Any, NamedTuple

import numpy as np

from peftjax.cli import _config, _output, _report, _whole
from peftjax.cli.meta import _curves, _paired, _record
from peftjax.cli.meta._methods import chosen
from peftjax.cli.meta._parts import FILE as PARTS
from peftjax.cli.meta._parts import Parts

FILE, TASKS = 'results.json', 'tasks.jsonl'
TABLE, PICTURE = 'table.txt', 'accuracy.png'
LEARNED = r'[a-z]+-\d+way-\d+shot(\.states)?'
"""Names of the folders of what is learned, and of the states of what is being learned."""

FREE = (*_config.UNSAID, 'out', 'methods', 'ways', 'shots', 'beside')
"""Options that may be others when a run goes on: they say which results there are to be, and how
they are told."""


class Found(NamedTuple):
    """What a folder has.

    Attributes:
      options: of its run, without those that may be others when it goes on.
      versions: that it was begun with; a record that was made with others says so.
      examples: digest of the texts and labels of its files.
      records: one for each method and shape.
      tasks: accuracies `(tasks, steps)` of each record, by its key.
    """

    options: dict[str, Any]
    versions: dict[str, str]
    examples: str
    records: list[dict[str, Any]]
    tasks: dict[tuple[str, int, int], np.ndarray]


def read(folder: pathlib.Path) -> Found:
    """What a run left.

    Args:
      folder: its `--out`.

    Raises:
      OSError: it has no results.
      ValueError: they are damaged.
    """
    place = folder / FILE
    try:
        found = json.loads(place.read_text(encoding='utf-8'))
        records, place = found['results'], folder / TASKS
        rows = map(json.loads, place.read_text(encoding='utf-8').splitlines())
        own = {_record.key(row): np.array(row['accuracy'], np.float32) for row in rows}
        # those of a record that was not written any more are left out
        tasks = {_record.key(record): own[_record.key(record)] for record in records}
        return Found(found['options'], found['versions'], found['examples'], records, tasks)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{place} must be what peftjax meta left: {error!r}. Choose another --out, or '
            '--overwrite'
        ) from error


def text(records: list[dict[str, Any]], beside: dict[str, list[dict[str, Any]]]) -> str:
    """The tables: accuracies, and methods beside others."""
    tables = _record.table(records), _paired.text(beside)
    return '\n\n'.join(filter(None, tables))


def lines(tasks: _paired.Tasks) -> str:
    """Accuracies on each task, as lines of JSON that `read` reads."""
    said = ''
    for (method, ways, shots), accuracies in tasks.items():
        rounded = np.round(accuracies.astype(np.float64), 3).tolist()
        line = {'method': method, 'ways': ways, 'shots': shots, 'accuracy': rounded}
        said += json.dumps(line) + '\n'
    return said


class Results:
    """Results so far, on disk after each of them.

    Attributes:
      out: the folder.
      records: so far.
      tasks: accuracies `(tasks, steps)` of each record, by its key.
      versions: that the first of them was made with.
      examples: digest of the texts and labels; empty until it begins.
    """

    def __init__(self, options: argparse.Namespace):
        """Takes the folder; nothing is made yet.

        Raises:
          OSError: it is taken, or cannot be made.
          ValueError: what is there to go on with is of other options, or damaged.
        """
        self._options, self.records, self.tasks = options, [], {}
        self.versions, self.examples = _report.versions(), ''
        self._parts: Parts | None = None
        self.out = pathlib.Path(options.out)
        self._begun = bool(options.resume) and (self.out / FILE).is_file()
        _output.check_free(self.out, options.overwrite or self._begun)
        if self._begun:
            found = self._earlier()
            self.records, self.tasks, self.examples = found.records, found.tasks, found.examples
            self.versions = found.versions if found.records else self.versions

    @property
    def adapters(self) -> pathlib.Path:
        """Where what is learned lies."""
        return self.out / _output.ADAPTERS

    def begin(self, examples: str | None = None) -> None:
        """Makes the folder, without results of an earlier run that is not gone on with.

        Args:
          examples: digest of texts and labels; None where there is nothing to do with them.

        Raises:
          ValueError: what is there to go on with was made of others.
        """
        if self._begun and examples not in (None, self.examples):
            raise ValueError(
                f'a run must go on with its own texts: --train, --valid or --test hold others now '
                f'than {self.out / FILE} was made of. Bring those back, or choose another --out'
            )
        self.examples = examples or self.examples
        if not self._begun:
            for name in (FILE, TASKS, TABLE, PICTURE, PARTS, _config.FILE):
                (self.out / name).unlink(missing_ok=True)
            if (self.out / _output.ADAPTERS).is_dir():
                for folder in self.adapters.iterdir():
                    if re.fullmatch(LEARNED, folder.name):
                        shutil.rmtree(folder)
        self.adapters.mkdir(parents=True, exist_ok=True)
        _config.write(self.out / _config.FILE, self._options)
        self._write()

    def has(self, method: str, ways: int, shots: int) -> bool:
        """Whether this one is done."""
        return (method, ways, shots) in map(_record.key, self.records)

    def add(self, record: dict[str, Any], accuracies: np.ndarray) -> None:
        """One more with its accuracies `(tasks, steps)`, which are on disk after it."""
        now = _report.versions()
        self.records.append(record if now == self.versions else record | {'versions': now})
        self.tasks[_record.key(record)] = accuracies
        self._write()
        self.parts().clear()

    def parts(self) -> Parts:
        """Of the result that is not whole."""
        if self._parts is None:
            made = {'examples': self.examples, 'versions': _report.versions()}
            self._parts = Parts(self.out / PARTS, made)
        return self._parts

    def text(self) -> str:
        """The tables."""
        return text(self.records, self._beside())

    def draw(self) -> None:
        """Writes the picture."""
        options = self._options
        title = f'{options.episodes} tasks, {options.queries} queries a label, 95 % confidence'
        _curves.draw(self.out / PICTURE, self.records, title)

    def _write(self) -> None:
        _whole.write(self.out / TASKS, lines(self.tasks))  # before the records that need them
        said = {
            'options': self._said(),
            'versions': self.versions,
            'examples': self.examples,
            'results': self.records,
            'beside': self._beside(),
        }
        _report.write_json(self.out / FILE, said)
        if self.records:
            _whole.write(self.out / TABLE, self.text() + '\n')

    def _beside(self) -> dict[str, list[dict[str, Any]]]:
        names = [way.name for way in chosen(self._options.beside)]
        return _paired.beside(names, self.records, self.tasks)

    def _said(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self._options).items() if name not in FREE}

    def _earlier(self) -> Found:
        path, found = self.out / FILE, read(self.out)
        for name, value in self._said().items():
            if found.options.get(name) != value:
                said, was = name.replace('_', '-'), found.options.get(name)
                raise ValueError(
                    f'a run must go on with its own options: --{said} was {was!r} '
                    f'in {path} and is {value!r} now. Say it as it was, or choose another --out'
                )
        return found
