"""Numbers as options."""

import argparse
import math


def count(text: str) -> int:
    """A whole number from 1 up.

    Raises:
      ArgumentTypeError: it is another text.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a whole number from 1 up; got {text!r}')
    return int(text)


def place(text: str) -> int:
    """A whole number from 0 up.

    Raises:
      ArgumentTypeError: it is another text.
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'must be a whole number from 0 up; got {text!r}')
    return int(text)


def positive(text: str) -> float:
    """A number above 0; a whole one stays one.

    Raises:
      ArgumentTypeError: it is another text.
    """
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f'must be a number above 0; got {text!r}')
    return int(text) if text.isdecimal() else value


def from_zero(text: str) -> float:
    """A number from 0 up.

    Raises:
      ArgumentTypeError: it is another text.
    """
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f'must be a number from 0 up; got {text!r}')
    return value


def share(text: str) -> float:
    """A number above 0, at most 1.

    Raises:
      ArgumentTypeError: it is another text.
    """
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f'must be above 0, at most 1; got {text!r}')
    return value


def seed(text: str) -> int:
    """A whole number from 0 to below 2**32.

    Raises:
      ArgumentTypeError: it is another text.
    """
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f'must be a whole number from 0 below 2**32; got {text!r}')
    return int(text)


def part(text: str) -> float:
    """A part of a whole, from 0 to below 1.

    Raises:
      ArgumentTypeError: it is another text.
    """
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f'must be from 0 to below 1; got {text!r}')
    return value


def _number(text: str) -> float:
    """A number, or NaN."""
    try:
        return float(text)
    except ValueError:
        return math.nan
