"""Prompts as the model met them in training."""

from typing import Any

import numpy as np

from peftjax.data._records import Record
from peftjax.data._samples import front, ids_of, rendered


def encode_prompt(
    tokenizer: Any, prompt: str, *, chat: bool = False, chat_template: str | None = None
) -> np.ndarray:
    """Tokenizes a prompt as `encode_records` does, so that what follows is what was learned.

    Args:
      tokenizer: as of `encode_records`.
      prompt: the text; what a tokenizer puts in front of texts is put in front, nothing behind.
      chat: the prompt is what a user says, rendered by the chat template, up to the answer.
      chat_template: in place of the tokenizer's own.

    Returns:
      `(n,)` int32.

    Raises:
      ValueError: no chat template or one that refuses the prompt, or no token at all.

    Example:
      >>> class Letters:
      ...     def __call__(self, text, add_special_tokens):
      ...         return {'input_ids': [1] * add_special_tokens + [ord(c) for c in text]}
      >>> encode_prompt(Letters(), 'ab')
      array([ 1, 97, 98], dtype=int32)
    """
    if chat:
        record = Record(where='the prompt', messages=({'role': 'user', 'content': prompt},))
        template = chat_template or getattr(tokenizer, 'chat_template', None)
        ids = ids_of(tokenizer, rendered(tokenizer, record, record.messages, template, True))
    else:
        ids = [*front(tokenizer, prompt), *ids_of(tokenizer, prompt)]
    if not ids:
        raise ValueError(f'the prompt {prompt!r} has no tokens: give it some text')
    return np.asarray(ids, np.int32)
