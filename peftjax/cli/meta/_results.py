"""The folder that `peftjax meta` fills, method by method, and goes on with."""

import argparse
import json
import pathlib
import re
import shutil
from typing import Any

from peftjax.cli import _config, _output, _report, _whole
from peftjax.cli.meta import _curves, _record

FILE, TABLE, PICTURE = 'results.json', 'table.txt', 'accuracy.png'
LEARNED = r'[a-z]+-\d+way-\d+shot(\.states)?'
"""Names of the folders of what is learned, and of the states of what is being learned."""

FREE = (*_config.UNSAID, 'out', 'methods', 'ways', 'shots')
"""Options that may be others when a run goes on: they say which results there are to be."""


class Results:
    """Results so far, on disk after each of them.

    Attributes:
      out: the folder.
      records: so far.
    """

    def __init__(self, options: argparse.Namespace):
        """Takes the folder; nothing is made yet.

        Raises:
          OSError: it is taken, or cannot be made.
          ValueError: what is there to go on with is of other options, or damaged.
        """
        self._options, self.records = options, []
        self.out = pathlib.Path(options.out)
        self._begun = bool(options.resume) and (self.out / FILE).is_file()
        _output.check_free(self.out, options.overwrite or self._begun)
        if self._begun:
            self.records = self._earlier()

    @property
    def adapters(self) -> pathlib.Path:
        """Where what is learned lies."""
        return self.out / _output.ADAPTERS

    def begin(self) -> None:
        """Makes the folder, without results of an earlier run that is not gone on with."""
        if not self._begun:
            for name in (FILE, TABLE, PICTURE, _config.FILE):
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

    def add(self, record: dict[str, Any]) -> None:
        """One more, which is on disk after it."""
        self.records.append(record)
        self._write()

    def draw(self) -> None:
        """Writes the picture."""
        options = self._options
        title = f'{options.episodes} tasks, {options.queries} queries a label, 95 % confidence'
        _curves.draw(self.out / PICTURE, self.records, title)

    def _write(self) -> None:
        said = {'options': self._said(), 'versions': _report.versions(), 'results': self.records}
        _report.write_json(self.out / FILE, said)
        if self.records:
            _whole.write(self.out / TABLE, _record.table(self.records) + '\n')

    def _said(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self._options).items() if name not in FREE}

    def _earlier(self) -> list[dict[str, Any]]:
        path = self.out / FILE
        try:
            found = json.loads(path.read_text(encoding='utf-8'))
            options, records = found['options'], found['results']
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path} must be what peftjax meta left: {error!r}. Choose another --out, or '
                '--overwrite'
            ) from error
        for name, value in self._said().items():
            if options.get(name) != value:
                said = name.replace('_', '-')
                raise ValueError(
                    f'a run must go on with its own options: --{said} was {options.get(name)!r} '
                    f'in {path} and is {value!r} now. Say it as it was, or choose another --out'
                )
        return records
