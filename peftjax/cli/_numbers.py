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
