"""Texts that a command is given: typed, in a file, or through standard input."""

import pathlib
import sys
from collections.abc import Sequence

from peftjax.data._text import check_characters


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
      ValueError: it is not UTF-8, a text that was typed is not, there is no text, or there are
        texts beside a file.
    """
    lines = list(typed)
    if lines and file:
        raise ValueError(f'give texts or --file, not both; got {lines[0]!r:.40} and --file {file}')
    if not lines:
        content = _read(pathlib.Path(file)) if file else _standard_input()
        lines = content.replace('\r', '\n').split('\n')
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise ValueError(f'there is no {what}: give texts, --file, or standard input')
    for text in found:
        check_characters(f'{what} {text!r:.60}', text)
    return found


def _read(path: pathlib.Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f'no such file: {path}')
    return _decoded(path.read_bytes(), str(path))


def _standard_input() -> str:
    """What is piped in; a program that calls this one may have put a text in its place."""
    pipe = getattr(sys.stdin, 'buffer', None)
    return sys.stdin.read() if pipe is None else _decoded(pipe.read(), 'standard input')


def _decoded(content: bytes, what: str) -> str:
    try:
        return content.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{what} must be UTF-8: byte {error.start} cannot be read') from error
