"""The examples that the options of a command name."""

import argparse
import dataclasses

import numpy as np

from peftjax import data
from peftjax.cli._task import Task


@dataclasses.dataclass(frozen=True)
class Sample:
    """The training examples of one seed.

    Attributes:
      seed: of the draw.
      tokens: of the examples.
      labels: `(n,)` integers.
    """

    seed: int
    tokens: data.Tokens
    labels: np.ndarray


def read(options: argparse.Namespace) -> tuple[data.Examples, data.Examples | None]:
    """The training and test examples: the shipped ones unless the options name files.

    Training examples of the user's own go with test examples of their own, or none.
    """
    train, test = data.default_messages()
    if options.train:
        train, test = labelled(options.train, options), None
    if options.test:
        test = labelled(options.test, options, train.names)
    return train, test


def labelled(
    path: str, options: argparse.Namespace, names: tuple[str, ...] | None = None
) -> data.Examples:
    """The examples of a file.

    Args:
      path: of the file.
      options: as parsed, with the names of the columns.
      names: that its labels must be of; None takes them from the file.

    Returns:
      The examples.
    """
    return data.load_labelled(
        path, text=options.text_column, label=options.label_column, names=names
    )


def draw(task: Task, train: data.Examples, shots: int, seeds: list[int]) -> list[Sample]:
    """The examples of each seed, their tokens padded to one length for all."""
    few = [data.few_shot(train, shots, seed) for seed in seeds]
    everything = task.encode(tuple(text for examples in few for text in examples.texts))
    samples, begin = [], 0
    for seed, examples in zip(seeds, few, strict=True):
        rows = slice(begin, begin + len(examples))
        tokens = data.Tokens(everything.input_ids[rows], everything.attention_mask[rows])
        samples.append(Sample(seed, tokens, examples.labels))
        begin += len(examples)
    return samples
