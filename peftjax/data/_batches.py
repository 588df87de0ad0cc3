"""Texts to token arrays, and batches of few, static shapes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from peftjax.data._index import positions

LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)


class Tokens(NamedTuple):
    """Tokenized texts, padded behind to one length.

    Attributes:
      input_ids: `(n, length)` int32.
      attention_mask: `(n, length)` int32, 1 at tokens and 0 at padding.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray


class Batch(NamedTuple):
    """A batch of static shape.

    Rows beyond the examples asked for repeat the first one with weight 0, so that they are valid
    input and `sum(weights * loss) / sum(weights)` is the mean over the real examples.

    Attributes:
      input_ids: `(size, length)` int32.
      attention_mask: `(size, length)` int32.
      weights: `(size,)` float32, 1 for real rows and 0 for padding.
      index: `(size,)` int64, the example in each row: `labels[batch.index]` are its labels.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    weights: np.ndarray
    index: np.ndarray


def encode(
    tokenizer: Any,
    texts: Sequence[str],
    max_tokens: int = 64,
    *,
    pad_id: int | None = None,
    lengths: Sequence[int] = LENGTHS,
) -> Tokens:
    """Tokenizes texts, with special tokens, and pads them to one of a few lengths.

    Args:
      tokenizer: a `tokenizers.Tokenizer` without padding and truncation of its own, or anything
        with the call interface of Hugging Face's tokenizers.
      texts: n texts, at least one.
      max_tokens: longer texts are cut behind; special tokens are kept and count.
      pad_id: the id to pad with. By default that of the tokenizer's padding token (`pad_token_id`,
        or the id of `[PAD]` or `<pad>`).
      lengths: the lengths to choose from: the smallest that holds the longest text, at most
        `max_tokens`.

    Returns:
      n rows.

    Raises:
      TypeError: `texts` is one string.
      ValueError: no texts, a text without tokens, no room for a token in `max_tokens`, a
        `tokenizers.Tokenizer` that pads or truncates, no padding token.

    Example:
      >>> def tokenizer(texts, truncation, max_length, padding):
      ...     return {'input_ids': [[ord(c) for c in text][:max_length] for text in texts]}
      >>> encode(tokenizer, ['ab', 'c'], pad_id=0, lengths=(3,)).input_ids
      array([[97, 98,  0],
             [99,  0,  0]], dtype=int32)
    """
    if isinstance(texts, str):
        raise TypeError(
            f'texts must be a sequence of texts, received one: put {texts!r} in a list.'
        )
    if not len(texts):
        raise ValueError('encode needs at least one text, received none.')
    texts = list(texts)
    if callable(tokenizer):
        out: Any = tokenizer(texts, truncation=True, max_length=max_tokens, padding=False)
        rows = out['input_ids']
    else:
        rows = _backend_rows(tokenizer, texts, max_tokens)
    pad_id = _pad_id(tokenizer) if pad_id is None else pad_id
    counts = np.array([len(row) for row in rows])
    if not counts.all():
        raise ValueError(f'every text needs a token, this has none: {texts[counts.argmin()]!r}.')
    mask = np.arange(_length(counts.max(), max_tokens, lengths)) < counts[:, None]
    ids = np.full(mask.shape, pad_id, np.int32)
    ids[mask] = np.concatenate([np.asarray(row, np.int32) for row in rows])
    return Tokens(ids, mask.astype(np.int32))


def take(
    tokens: Tokens, index: np.ndarray, size: int, *, lengths: Sequence[int] = LENGTHS
) -> Batch:
    """The examples at `index` as a batch of `size` rows and one of a few lengths.

    Args:
      tokens: all examples, as `encode` gives them.
      index: `(m,)` integers, `1 <= m <= size`.
      size: rows of the batch.
      lengths: the lengths to choose from: the smallest that holds the longest of these examples,
        at most the length of `tokens`. jit compiles one program per length.

    Returns:
      The batch.

    Raises:
      ValueError: `index` is empty or longer than `size`.
      TypeError: it is of no integers; a mask is none.

    Example:
      >>> tokens = Tokens(np.ones((3, 40), np.int32), np.ones((3, 40), np.int32))
      >>> batch = take(tokens, np.array([2, 0]), size=4)
      >>> batch.input_ids.shape, batch.weights.tolist(), batch.index.tolist()
      ((4, 40), [1.0, 1.0, 0.0, 0.0], [2, 0, 2, 2])
    """
    index = positions(index)
    if not 1 <= len(index) <= size:
        raise ValueError(f'a batch of size {size} holds 1 to {size} examples: got {len(index)}.')
    filled = np.concatenate([index, np.full(size - len(index), index[0])])
    mask = tokens.attention_mask[filled]
    length = _length(mask.sum(1).max(), mask.shape[1], lengths)
    weights = (np.arange(size) < len(index)).astype(np.float32)
    return Batch(tokens.input_ids[filled, :length], mask[:, :length], weights, filled)


def _length(longest: int, limit: int, lengths: Sequence[int]) -> int:
    return min([limit, *(length for length in lengths if length >= longest)])


def _backend_rows(tokenizer: Any, texts: list[str], max_tokens: int) -> list[list[int]]:
    """Token ids by a `tokenizers.Tokenizer`, which is left as it is."""
    if tokenizer.padding is not None or tokenizer.truncation is not None:
        raise ValueError(
            'the tokenizer must neither pad nor truncate by itself: '
            'call tokenizer.no_padding() and tokenizer.no_truncation() first.'
        )
    room = max_tokens - tokenizer.num_special_tokens_to_add(False)
    if room < 1:
        raise ValueError(
            f'max_tokens must leave room beside {max_tokens - room} special tokens: '
            f'received {max_tokens}.'
        )
    rows = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        encoding.truncate(room)
        rows.append(tokenizer.post_process(encoding).ids)
    return rows


def _pad_id(tokenizer: Any) -> int:
    by_name = getattr(tokenizer, 'token_to_id', lambda name: None)
    candidates = (getattr(tokenizer, 'pad_token_id', None), by_name('[PAD]'), by_name('<pad>'))
    for candidate in candidates:
        if candidate is not None:
            return candidate
    raise ValueError('the tokenizer names no padding token: pass pad_id.')
