"""Texts that a command is given: typed, in a file, or through standard input."""

import pathlib
import sys
from collections.abc import Sequence


def texts(typed: Sequence[str], file: str | None, what: str) -> tuple[str, ...]:
    """The texts: those typed, else one a line.

    Args:
      typed: on the command line.
      file: that holds them otherwise; None for standard input.
      what: they are, for errors.

    Returns:
      Texts that are not empty, without white space around them.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not UTF-8, there is no text, or there are texts beside a file.
    """
    lines = list(typed)
    if lines and file:
        raise ValueError(f'give texts or --file, not both; got {lines[0]!r:.40} and --file {file}')
    if not lines:
        content = _read(pathlib.Path(file)) if file else sys.stdin.read()
        lines = content.split('\n')
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise ValueError(f'there is no {what}: give texts, --file, or standard input')
    return found


def _read(path: pathlib.Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f'no such file: {path}')
    try:
        return path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} must be UTF-8: byte {error.start} cannot be read') from error
