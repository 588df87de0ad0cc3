"""Puts folders of `peftjax meta` into one: results, tasks, table and picture.

    python benchmarks/clinc_table.py runs/clinc/* --out runs/clinc-all [--json results/clinc.json]
        [--untimed] [--beside lora,nearest]

Each folder has some methods on some shapes of tasks, so that they can be run side by side. What
makes results of one shape comparable must be the same in all folders that have it: data, tasks,
rates, seeds, versions, device. Shapes may differ in how many tasks they have and in what phi was
meta-trained on; for each shape that is said beside the results. Methods may be judged after other
numbers of steps: rates are chosen for each number by itself, and those that two have in common are
compared.
Times of a machine that had other work tell nothing: `--untimed` leaves them out.
"""

import argparse
import json
import pathlib
from typing import Any, NamedTuple

from peftjax.cli import _whole
from peftjax.cli.meta import _curves, _paired, _record, _results
from peftjax.cli.meta._methods import WAYS, chosen
from peftjax.cli.meta._results import Found

BY_SHAPE = (
    'episodes', 'valid_episodes', 'meta_ways', 'meta_shots', 'meta_queries', 'meta_steps',
    'meta_tasks',
)  # fmt: skip
"""Options that shapes may differ in."""

BY_METHOD = ('steps',)
"""Options that methods may differ in too; records say their own."""


class Joined(NamedTuple):
    """Results of several folders.

    Attributes:
      options: of all.
      shapes: the options of each shape of tasks, by its name.
      versions: that all were made with.
      records: sorted by shape and method.
      tasks: accuracies `(tasks, steps)` of each record, by its key.
    """

    options: dict[str, Any]
    shapes: dict[str, dict[str, Any]]
    versions: dict[str, str]
    records: list[dict[str, Any]]
    tasks: _paired.Tasks


def main() -> None:
    parser = argparse.ArgumentParser(description='folders of peftjax meta in one')
    parser.add_argument('folders', nargs='+', type=pathlib.Path, help='those to put together')
    parser.add_argument('--out', type=pathlib.Path, required=True, help='a new folder')
    parser.add_argument('--json', type=pathlib.Path, help='the results once more, here')
    parser.add_argument('--untimed', action='store_true', help='leave out all times')
    parser.add_argument('--beside', default='lora', help='what others are compared with')
    options = parser.parse_args()
    out = options.out
    if out.exists():
        parser.error(f'--out must be a new folder: {out} is there')
    found = joined({str(folder): _results.read(folder) for folder in options.folders})
    if options.untimed:
        found = found._replace(records=[untimed(record) for record in found.records])
    names = [way.name for way in chosen(options.beside)]
    beside = _paired.beside(names, found.records, found.tasks)
    text = _results.text(found.records, beside)
    out.mkdir(parents=True, exist_ok=True)
    for path in (out / _results.FILE, options.json):
        if path:
            _whole.write(path, json_of(found, beside))
    _whole.write(out / _results.TASKS, _results.lines(found.tasks))
    _whole.write(out / _results.TABLE, text + '\n')
    title = f'{found.options["queries"]} queries a label, 95 % confidence'
    _curves.draw(out / _results.PICTURE, found.records, title)
    print(text)


def joined(folders: dict[str, Found]) -> Joined:
    """All results together.

    Args:
      folders: what each has, by its name.

    Raises:
      ValueError: they are not comparable, or two have the same result.
    """
    (first, one), *others = folders.items()
    for name, other in others:
        _same(first, name, one.versions, other.versions, 'made with')
        _same(first, name, *({'examples': each.examples} for each in (one, other)), 'made of')
        _same(first, name, common(one.options), common(other.options), 'run with')
    shapes: dict[str, dict[str, Any]] = {}
    records, tasks, made_by = [], {}, {}
    for name, found in folders.items():
        own = {option: found.options[option] for option in BY_SHAPE}
        for record in found.records:
            _same(first, name, one.versions, record.get('versions', one.versions), 'made with')
            key, shape = _record.key(record), f'{record["ways"]}-way {record["shots"]}-shot'
            if key in made_by:
                raise ValueError(
                    f'a result must be in one folder: {made_by[key]} and {name} both have '
                    f'{record["method"]} on {shape} tasks. Leave one of the two out'
                )
            known = next((made_by[k] for k in made_by if k[1:] == key[1:]), name)
            _same(known, name, shapes.setdefault(shape, own), own, f'run on {shape} tasks with')
            made_by[key] = name
            records.append(record)
            tasks[key] = found.tasks[key]
    place = list(WAYS).index
    records.sort(key=lambda record: (record['ways'], record['shots'], place(record['method'])))
    return Joined(common(one.options), shapes, one.versions, records, tasks)


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    """A result without times."""
    meta = record['meta'] and record['meta'] | {'seconds': None, 'compile_seconds': None}
    return record | {'milliseconds': None, 'compile_seconds': None, 'meta': meta}


def common(options: dict[str, Any]) -> dict[str, Any]:
    """Those that must be the same in all folders."""
    return {name: value for name, value in options.items() if name not in BY_SHAPE + BY_METHOD}


def _same(first: str, second: str, one: dict[str, Any], other: dict[str, Any], what: str) -> None:
    for name in sorted({*one, *other}):
        if one.get(name) != other.get(name):
            raise ValueError(
                f'folders must be comparable: {first} was {what} {name} {one.get(name)!r}, '
                f'{second} with {other.get(name)!r}. Leave one out, or run it again as the other'
            )


def json_of(found: Joined, beside: dict[str, list[dict[str, Any]]]) -> str:
    """All of it, a line for each result."""
    rows = {'results': found.records}
    rows |= {f'beside_{name}': own for name, own in beside.items()}
    named = {name: pathlib.Path(found.options[name]).name for name in ('train', 'valid', 'test')}
    options = found.options | named  # where files lay tells nobody anything
    head = {'options': options, 'shapes': found.shapes, 'versions': found.versions}
    parts = [f'"{name}": {json.dumps(value)}' for name, value in head.items()]
    for name, own in rows.items():
        parts.append(f'"{name}": [\n' + ',\n'.join(map(json.dumps, own)) + '\n]')
    return '{\n' + ',\n'.join(parts) + '\n}\n'


if __name__ == '__main__':
    main()
