"""Samples in rows of one length: one per row, or several without touching each other."""

import bisect
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from peftjax.data._samples import Sample

IGNORED = -100


class LanguageBatch(NamedTuple):
    """Rows of tokens for a causal language model.

    Attributes:
      input_ids: `(size, length)` int32.
      targets: `(size, length)` int32, the token to predict at each position, -100 for none. No
        example predicts a token of another one.
      positions: `(size, length)` int32, from 0 in every example.
      segment_ids: `(size, length)` int32, the example in the row that a token is of, from 1; 0 at
        padding. A token may attend to those of its own segment.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Samples laid out in rows of one length, each built when it is asked for.

    Attributes:
      samples: all of them.
      layout: for each row the samples in it, in order.
      length: tokens in a row.
      pad_id: the token at padding.
    """

    samples: tuple[Sample, ...]
    layout: tuple[tuple[int, ...], ...]
    length: int
    pad_id: int = 0

    def __len__(self) -> int:
        return len(self.layout)

    def batch(self, index: Sequence[int], size: int) -> LanguageBatch:
        """The rows at `index` as a batch of `size` rows; those beyond are padding.

        Args:
          index: at most `size` integers, positions in `layout`.
          size: rows of the batch.

        Returns:
          The batch.
        """
        rows = LanguageBatch(*np.zeros((4, size, self.length), np.int32))
        rows.input_ids.fill(self.pad_id)
        rows.targets.fill(IGNORED)
        for row, place in enumerate(index):
            end = 0
            for segment, i in enumerate(self.layout[place], 1):
                ids, learned = self.samples[i]
                start, end = end, end + len(ids)
                rows.input_ids[row, start:end] = ids
                rows.targets[row, start : end - 1] = np.where(learned[1:], ids[1:], IGNORED)
                rows.positions[row, start:end] = np.arange(len(ids))
                rows.segment_ids[row, start:end] = segment
        return rows

    def fingerprint(self) -> str:
        """A digest of all that the rows are made of."""
        digest = hashlib.sha256(repr((self.layout, self.length, self.pad_id)).encode())
        for ids, learned in self.samples:
            digest.update(ids.tobytes() + learned.tobytes())
        return digest.hexdigest()


def one_per_row(samples: Sequence[Sample], length: int, *, pad_id: int = 0) -> Rows:
    """Every sample in a row of its own.

    Args:
      samples: each of at most `length` tokens.
      length: tokens in a row.
      pad_id: the token at padding.

    Returns:
      As many rows as samples, in order.

    Raises:
      ValueError: no samples, one without tokens, or one that is longer.

    Example:
      >>> sample = Sample(np.arange(3), np.array([False, True, True]))
      >>> one_per_row([sample], 4).batch([0], 1).targets
      array([[   1,    2, -100, -100]], dtype=int32)
    """
    _check(samples, length)
    return Rows(tuple(samples), tuple((i,) for i in range(len(samples))), length, pad_id)


def pack(samples: Sequence[Sample], length: int, *, pad_id: int = 0) -> Rows:
    """Several samples in a row: the longest first, each into the fullest row that has room.

    The model must tell them apart by `segment_ids` and `positions`; then it says of each what it
    says of it alone.

    Args:
      samples: each of at most `length` tokens.
      length: tokens in a row.
      pad_id: the token at padding.

    Returns:
      The rows, the same for the same samples, in the order of the first sample in each.

    Raises:
      ValueError: no samples, one without tokens, or one that is longer.

    Example:
      >>> samples = [Sample(np.arange(n), np.ones(n, bool)) for n in (3, 4, 2)]
      >>> packed = pack(samples, 5)
      >>> packed.layout
      ((0, 2), (1,))
      >>> packed.batch([0], 1).segment_ids, packed.batch([0], 1).positions
      (array([[1, 1, 1, 2, 2]], dtype=int32), array([[0, 1, 2, 0, 1]], dtype=int32))

    Reference: Krell et al., Efficient Sequence Packing without Cross-contamination, 2021,
    arXiv:2107.02027.
    """
    _check(samples, length)
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of each row that has any, the least first
    for i in sorted(range(len(samples)), key=lambda i: -len(samples[i].ids)):
        size = len(samples[i].ids)
        at = bisect.bisect_left(room, (size, -1))
        if at == len(room):
            left, row = length, len(rows)
            rows.append([])
        else:
            left, row = room.pop(at)
        rows[row].append(i)
        if left > size:
            bisect.insort(room, (left - size, row))
    return Rows(tuple(samples), tuple(sorted(tuple(sorted(row)) for row in rows)), length, pad_id)


def _check(samples: Sequence[Sample], length: int) -> None:
    if not samples:
        raise ValueError('rows need at least one sample, received none.')
    sizes = [len(sample.ids) for sample in samples]
    if not min(sizes):
        raise ValueError(
            f'rows are of samples with tokens: sample {sizes.index(0)} has none. Leave it out.'
        )
    if max(sizes) > length:
        raise ValueError(
            f'rows of length {length} cannot hold sample {sizes.index(max(sizes))} of {max(sizes)} '
            'tokens: encode the records with max_tokens of at most the length.'
        )
