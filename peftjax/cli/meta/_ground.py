"""The encoder and the texts of three files, both on the device: tasks are positions in them."""

import argparse
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from peftjax import data, models
from peftjax.cli._examples import labelled

PARTS = ('valid', 'test', 'train')
"""To choose rates and checkpoints on, to judge on, to meta-train on: of the last, the largest,
frozen methods need no features."""

ROWS = 64
"""Texts of a batch where nothing is trained."""


class Shape(NamedTuple):
    """Of a task: labels, and examples of each to adapt to."""

    ways: int
    shots: int


class Part(NamedTuple):
    """The texts of one file.

    Attributes:
      option: that named the file.
      labels: `(n,)` integers.
      names: of the labels, by number.
      first: position of its first text among those of all files.
    """

    option: str
    labels: np.ndarray
    names: Sequence[str]
    first: int

    def episodes(
        self, *, ways: int, shots: int, queries: int, tasks: int, seed: int
    ) -> data.Episodes:
        """Tasks of these texts, as positions among all.

        Raises:
          ValueError: the file has too few labels, or one has too few texts.
        """
        numbers = {'ways': ways, 'shots': shots, 'queries': queries, 'tasks': tasks, 'seed': seed}
        rows = lambda index: index + np.int32(self.first)
        self._check(shots + queries)
        try:
            return data.Episodes(self.labels, **numbers, rows=rows)
        except ValueError as error:
            raise ValueError(f'--{self.option}: {error}') from error

    def _check(self, each: int) -> None:
        """Refuses labels of too few texts by their names, which `Episodes` does not know."""
        counts = np.bincount(self.labels, minlength=len(self.names))
        few = [(name, n) for name, n in zip(self.names, counts, strict=True) if n < each]
        if few:
            raise ValueError(
                f'--{self.option}: every label needs at least {each} texts, for shots and queries: '
                f'{few[0][0]!r} has {few[0][1]} ({len(few)} of {len(counts)} labels have too few). '
                'Ask for fewer, or leave those labels out'
            )

    def drawn(self, shape: Shape, *, queries: int, tasks: int, seed: int) -> data.Episode:
        """So many tasks; the same for the same seed."""
        return next(self.episodes(**shape._asdict(), queries=queries, tasks=tasks, seed=seed))


@dataclasses.dataclass(frozen=True)
class Ground:
    """What all methods stand on.

    Attributes:
      model: folder or hub name, empty for the default model.
      apply: `apply(params, ids, attention_mask=…)` to hidden states.
      theta: `params`; `ids` and `mask` `(texts, tokens)`.
      features: `(texts, width)` of those to validate and to test on, frozen.
      parts: by name.
      max_tokens: longer texts were cut.
    """

    model: str
    apply: Any
    theta: dict[str, Any]
    features: jax.Array
    parts: dict[str, Part]
    max_tokens: int

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.theta['ids'].shape[1]


def read(options: argparse.Namespace) -> dict[str, data.Examples]:
    """The examples of the three files.

    Raises:
      ValueError: two files share a label.
    """
    found = {name: labelled(getattr(options, name), options) for name in PARTS}
    for one, other in itertools.combinations(PARTS, 2):
        if both := sorted(set(found[one].names) & set(found[other].names)):
            raise ValueError(
                '--train, --valid and --test must have labels that no two of them share: '
                f'--{one} and --{other} both have {both[0]!r} ({len(both)} in all). A task of '
                'known labels is not new; leave each in one of the files'
            )
    return found


def digest(examples: Mapping[str, data.Examples]) -> str:
    """Of the texts and labels of all files, in order."""
    found = hashlib.sha256()
    for name, own in examples.items():
        said = [name, own.texts, own.labels.tolist(), own.names]
        found.update(json.dumps(said).encode())
    return found.hexdigest()


def load(options: argparse.Namespace, examples: dict[str, data.Examples]) -> Ground:
    """The encoder, and all texts as tokens, on the device."""
    folder = options.model or models.default_model_path()
    loaded, tokenizer = models.load_encoder(folder), models.load_tokenizer(folder)
    texts, parts = [], {}
    for name, own in examples.items():
        parts[name] = Part(name, own.labels, own.names, len(texts))
        texts += own.texts
    # every multiple of eight: with few rows of few tokens, padding is most of what is computed
    lengths = range(8, options.max_tokens + 8, 8)
    pad = loaded.config.pad_token_id
    tokens = data.encode(tokenizer, texts, options.max_tokens, pad_id=pad, lengths=lengths)
    theta = {
        'params': loaded.params,
        'ids': jnp.asarray(tokens.input_ids),
        'mask': jnp.asarray(tokens.attention_mask),
    }
    apply, judged = loaded.model.apply_fn, np.arange(parts['train'].first)
    features = encoded(
        jax.jit(lambda theta, _, index: embed(apply, theta, index)), theta, {}, judged
    )
    return Ground(options.model, apply, theta, features, parts, options.max_tokens)


def pooled(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """Features `(texts, width)` of hidden states: their means, brought to length one.

    Sentence encoders are trained and meant to be used so. Lengths of the means say little of what a
    text means, and as much as anything of how near it is to the one example of a label.
    """
    means = models.mean_pool(hidden, mask)
    return means * lax.rsqrt(jnp.square(means).sum(-1, keepdims=True))


def embed(apply: Callable[..., jax.Array], theta: dict[str, Any], index: jax.Array) -> jax.Array:
    """Features `(texts, width)` of texts at positions."""
    ids, mask = theta['ids'][index], theta['mask'][index]
    return pooled(apply(theta['params'], ids, attention_mask=mask), mask)


def encoded(
    program: Callable[..., jax.Array], theta: dict[str, Any], phi: Any, index: np.ndarray
) -> jax.Array:
    """Features of many texts, some at a time.

    Args:
      program: `program(theta, phi, index)` to features of so many texts, compiled.
      theta: the encoder and its texts.
      phi: what it has.
      index: of the texts, ascending.

    Returns:
      `(index[-1] + 1, width)`; zero between.
    """
    places = np.pad(index, (0, -len(index) % ROWS), mode='edge').reshape(-1, ROWS)
    rows = np.concatenate([np.asarray(program(theta, phi, one)) for one in places])
    found = np.zeros((index[-1] + 1, rows.shape[1]), rows.dtype)
    found[index] = rows[: len(index)]
    return jnp.asarray(found)
