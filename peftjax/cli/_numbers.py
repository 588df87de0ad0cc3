"""Numbers as options."""

import argparse


def count(text: str) -> int:
    """A whole number from 1 up.

    Raises:
      ArgumentTypeError: it is another text.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a whole number from 1 up; got {text!r}')
    return int(text)


def part(text: str) -> float:
    """A part of a whole, from 0 to below 1.

    Raises:
      ArgumentTypeError: it is another text.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f'must be from 0 to below 1; got {text!r}')
    return value
