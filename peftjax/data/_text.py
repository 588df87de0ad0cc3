"""Labelled texts and the files they come from."""

import csv
import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from peftjax.data._index import positions

_Rows = Iterator[tuple[int, Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Texts and their labels.

    Args:
      texts: n texts.
      labels: `(n,)` int32, positions in `names`.
      names: the label names, sorted.

    Raises:
      ValueError: as many labels as texts are needed, each of them a position in `names`.

    Example:
      >>> Examples(('hi', 'bye', 'ciao'), np.array([0, 1, 1]), ('hello', 'parting')).take([2])
      Examples(texts=('ciao',), labels=array([1], dtype=int32), names=('hello', 'parting'))
    """

    texts: tuple[str, ...]
    labels: np.ndarray
    names: tuple[str, ...]

    def __post_init__(self):
        labels = np.asarray(self.labels)
        if labels.shape != (len(self.texts),) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f'labels must be one integer per text: received shape {labels.shape} of '
                f'{labels.dtype} for {len(self.texts)} texts.'
            )
        if labels.size and not 0 <= labels.min() <= labels.max() < len(self.names):
            raise ValueError(
                f'labels must be positions in names, 0 to {len(self.names) - 1}: received '
                f'{labels.min()} to {labels.max()}.'
            )
        object.__setattr__(self, 'labels', labels.astype(np.int32))

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: Sequence[int] | np.ndarray) -> 'Examples':
        """The examples at `index`, in that order, under the same names.

        Args:
          index: `(m,)` integers, positions in `texts`.

        Returns:
          m examples.

        Raises:
          TypeError: the index is of no integers; a mask is none.
        """
        index = positions(index)
        return Examples(tuple(self.texts[i] for i in index), self.labels[index], self.names)


def load_labelled(
    path: str | os.PathLike[str],
    *,
    text: str = 'text',
    label: str = 'label',
    names: Sequence[str] | None = None,
) -> Examples:
    """Reads labelled texts from a `.jsonl` or `.csv` file in UTF-8.

    Args:
      path: one JSON object per line, or a CSV table with a header line.
      text: the column of the texts.
      label: the column of the labels: text, or whole numbers in jsonl.
      names: the label names of the training file, when this is its test file. The labels then
        count in these names, and need not all occur.

    Returns:
      The examples in the order of the file. Without `names`, the names are the labels found,
      sorted (whole numbers by value).

    Raises:
      FileNotFoundError: no such file.
      ValueError: an unknown extension, not UTF-8, a broken line, a missing column, an empty text
        or label, no example at all, a single class, a label that `names` does not have.

    Example:
      >>> train, _ = default_messages()
      >>> topics = load_labelled(MESSAGES / 'train.jsonl', label='topic')
      >>> topics.names[:3], topics.texts == train.texts
      (('bank card', 'delivery', 'doctor'), True)
    """
    path = present(path)
    parse = _parser(path)
    texts, values = [], []
    for line, row in parse(path, read(path)):
        if missing := [column for column in (text, label) if row.get(column) is None]:
            raise ValueError(
                f'{path}, line {line}: every example needs the columns {text!r} and {label!r}; '
                f'no value for {", ".join(map(repr, missing))}. '
                f'Columns found: {", ".join(map(repr, row)) or "none"}.'
            )
        texts.append(_checked_text(path, line, text, row[text]))
        values.append(_checked_label(path, line, label, row[label]))
    if not texts:
        raise ValueError(f'{path} holds no examples: at least one is needed.')
    return Examples(tuple(texts), *_number(path, values, names))


MESSAGES = pathlib.Path(__file__).parent / 'messages'


def default_messages() -> tuple[Examples, Examples]:
    """The shipped data set: customer messages, labelled by what the sender wants done.

    Returns:
      `(train, test)`, 336 messages each: 7 acts, each across the same 12 topics.

    Example:
      >>> train, test = default_messages()
      >>> len(train), len(test), train.names[:4]
      (336, 336, ('booking', 'cancellation', 'complaint', 'praise'))
    """
    train = load_labelled(MESSAGES / 'train.jsonl')
    return train, load_labelled(MESSAGES / 'test.jsonl', names=train.names)


def present(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path of a file that is there, whatever its name."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'no such file: {path} (looked in {pathlib.Path.cwd()}).')
    return path


def read(path: pathlib.Path) -> str:
    try:
        content = path.read_bytes().decode('utf-8-sig')  # spreadsheets write the mark
    except UnicodeDecodeError as error:
        raise ValueError(
            f'{path} must be UTF-8: byte {error.start} cannot be read. Save the file as UTF-8.'
        ) from error
    if not content.strip():
        raise ValueError(f'{path} is empty: at least one example is needed.')
    return content


def _parser(path: pathlib.Path) -> Callable[[pathlib.Path, str], _Rows]:
    parsers = {'.jsonl': jsonl_rows, '.csv': _csv_rows}
    if (kind := path.suffix.lower()) not in parsers:
        raise ValueError(f'{path} must end in {" or ".join(parsers)}: received {kind!r}.')
    return parsers[kind]


def jsonl_rows(path: pathlib.Path, content: str) -> _Rows:
    for number, line in enumerate(content.split('\n'), 1):  # JSON may hold other line separators
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # of too many digits, too deep
            why = getattr(error, 'msg', error)
            raise ValueError(f'{path}, line {number} must be JSON: {why}.') from error
        if not isinstance(row, dict):
            raise ValueError(
                f'{path}, line {number} must be a JSON object like {{"text": ..., ...}}: '
                f'received {line.strip()[:40]!r}.'
            )
        yield number, row


def _csv_rows(path: pathlib.Path, content: str) -> _Rows:
    reader = csv.DictReader(io.StringIO(content, newline=''), strict=True)
    try:
        _check_header(path, reader.fieldnames or ())
        for row in reader:
            if None in row:
                raise ValueError(
                    f'{path}, line {reader.line_num} has more cells than the header has columns '
                    f'({len(reader.fieldnames or ())}): put texts that hold commas in quotes.'
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f'{path}, after line {reader.line_num}: must be CSV: {error}.') from error


def _check_header(path: pathlib.Path, names: Sequence[str]) -> None:
    """Refuses columns of one name, of which the last alone would be read."""
    # spreadsheets leave columns without any name behind, which nobody asks for
    if twice := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
        raise ValueError(
            f'{path}: each column of the header must have a name of its own; there is more than '
            f'one of {", ".join(map(repr, twice))}. Rename all but one.'
        )


def _checked_text(path: pathlib.Path, line: int, column: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f'{path}, line {line}: {column!r} must be a text that is not empty: received {value!r}.'
        )
    check_characters(f'{path}, line {line}: {column!r}', value)
    return value


def check_characters(where: str, text: str) -> None:
    """Refuses half a character, which no tokenizer takes.

    Args:
      where: the text comes from, for the error.
      text: any.

    Raises:
      ValueError: it holds a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f'{where} must be Unicode text: character {error.start + 1} is half of one, '
            f'{text[error.start]!r}. Write it as UTF-8, or take it out.'
        ) from error


def _checked_label(path: pathlib.Path, line: int, column: str, value: Any) -> str | int:
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(
            f'{path}, line {line}: {column!r} must be a text that is not empty, or a whole number: '
            f'received {value!r}.'
        )
    check_characters(f'{path}, line {line}: {column!r}', str(value))
    return value


def _check_apart(path: pathlib.Path, names: Sequence[str]) -> None:
    """Refuses labels that nobody could tell apart when they are printed."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(name.strip(), []).append(name)
    if found := [group for group in alike.values() if len(group) > 1]:
        raise ValueError(
            f'{path}: labels must differ by more than white space around them; found '
            f'{" and ".join(map(repr, found[0]))}. Write them alike.'
        )


def _number(
    path: pathlib.Path, values: list[str | int], names: Sequence[str] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    found: set[Any] = set(values)
    if len({type(value) for value in found}) > 1:
        raise ValueError(f'{path}: labels must be all text or all whole numbers, found both.')
    ordered = tuple(str(value) for value in sorted(found))
    _check_apart(path, ordered)
    if names is None and len(ordered) == 1:
        raise ValueError(f'{path} has one class only, {ordered[0]!r}: at least two are needed.')
    names = ordered if names is None else tuple(names)
    if extra := [name for name in ordered if name not in names]:
        raise ValueError(
            f'{path}: every label must also occur in the training data, these do not: '
            f'{", ".join(map(repr, extra))}. Known: {", ".join(map(repr, names))}.'
        )
    position = {name: i for i, name in enumerate(names)}
    return np.array([position[str(value)] for value in values], np.int32), names
