"""Which examples are held back to evaluate on."""

import argparse

import numpy as np


def split(count: int, options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Places of examples: those to train on, and those that `--eval-part` holds back.

    Args:
      count: of the examples.
      options: as parsed; `eval_part`, `eval_data` and `seed` are looked at.

    Returns:
      Both in ascending order; the second is empty where nothing is held back.

    Raises:
      ValueError: an evaluation file beside an evaluation part, or nothing left on one side.
    """
    if options.eval_data and options.eval_part:
        raise ValueError(
            f'evaluate on --eval-data or on --eval-part; got {options.eval_data!r} and '
            f'{options.eval_part}. --eval-part 0 holds nothing back'
        )
    held = round(options.eval_part * count)
    if options.eval_part and not 0 < held < count:
        raise ValueError(
            f'--eval-part {options.eval_part} of {count} examples leaves {held} to '
            'evaluate on: at least one is needed there, and one to train on'
        )
    order = np.random.default_rng(options.seed).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])
