"""The rows that the options of `tune` name: to train on, and to evaluate on."""

import argparse
from typing import NamedTuple

from peftjax import data
from peftjax.cli._held import split
from peftjax.cli.language._task import Task, encode


class Split(NamedTuple):
    """Rows of one length.

    Attributes:
      train: to train on.
      held: to evaluate on; None where nothing is.
      dropped: how many examples were left out because they are too long.
    """

    train: data.Rows
    held: data.Rows | None
    dropped: int


class Records(NamedTuple):
    """Examples as the files have them; `held` is empty where nothing is evaluated."""

    train: tuple[data.Record, ...]
    held: tuple[data.Record, ...]


def read(options: argparse.Namespace) -> Records:
    """Reads the files that the options name.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: no data, an evaluation file beside an evaluation part, or nothing left to train
        on.
    """
    if not options.train:
        raise ValueError('a language model needs examples: --data with a jsonl file')
    records = _load(options.train, options)
    train, held = (tuple(records[i] for i in part) for part in split(len(records), options))
    return Records(train, _load(options.eval_data, options) if options.eval_data else held)


def _load(path: str, options: argparse.Namespace) -> tuple[data.Record, ...]:
    return data.load_records(
        path,
        messages=options.messages_column,
        prompt=options.prompt_column,
        completion=options.completion_column,
        text=options.text_column,
    )


def rows(task: Task, records: Records, options: argparse.Namespace, pack: bool) -> Split:
    """Encodes records and lays them out.

    Args:
      task: the model.
      records: as read.
      options: as parsed.
      pack: whether a row may hold several.

    Returns:
      The rows.

    Raises:
      ValueError: no example can be used.
    """
    lay = data.pack if pack else data.one_per_row
    how = (options.length, options.answer_only, options.too_long)
    samples = [encode(task, part, *how) for part in records if part]
    laid = [lay(part, options.length, pad_id=task.pad_id) for part in samples]
    dropped = sum(map(len, records)) - sum(map(len, samples))
    return Split(laid[0], laid[1] if len(laid) > 1 else None, dropped)
