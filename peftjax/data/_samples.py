"""Records to token ids, and which of them are to be learned."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from peftjax.data._records import Record


class Sample(NamedTuple):
    """One example as tokens.

    Attributes:
      ids: `(n,)` int32.
      learned: `(n,)` bool, the tokens that the model shall learn to say.
    """

    ids: np.ndarray
    learned: np.ndarray


def encode_records(
    tokenizer: Any,
    records: Sequence[Record],
    *,
    max_tokens: int,
    answers_only: bool = True,
    too_long: Literal['refuse', 'cut', 'drop'] = 'refuse',
    eos_id: int | None = None,
    chat_template: str | None = None,
) -> tuple[Sample, ...]:
    """Tokenizes records and finds the tokens to learn.

    A conversation goes through the chat template. An answer is what the template adds between the
    prompt for it and the end of its message; as tokens, it lies behind the tokens of that prompt,
    which must begin the conversation's tokens just as they would alone, since alone is how the
    model will meet them. The same holds for a prompt and its completion. Texts and completions get
    what the tokenizer puts in front of a text, and its end-of-text token behind.

    Args:
      tokenizer: a tokenizer of Hugging Face's transformers, or, where there are no conversations, a
        `tokenizers.Tokenizer`.
      records: at least one.
      max_tokens: the most tokens that an example may have.
      answers_only: learn answers and completions; else every token. Texts are learned whole.
      too_long: what becomes of longer examples: an error, cut behind, or left out.
      eos_id: the end-of-text token, by default the tokenizer's.
      chat_template: in place of the tokenizer's own.

    Returns:
      A sample for each record that is not left out.

    Raises:
      ValueError: no records, no chat template or one that refuses a conversation, no end-of-text
        token, an example that is too long or has nothing to learn, a prompt whose tokens change
        with what follows.

    Example:
      >>> class Letters:
      ...     eos_token_id = 0
      ...     def __call__(self, text, add_special_tokens):
      ...         return {'input_ids': [1] * add_special_tokens + [ord(c) for c in text]}
      >>> records = [Record(where='here', prompt='ab', completion='c')]
      >>> encode_records(Letters(), records, max_tokens=8)
      (Sample(ids=array([ 1, 97, 98, 99,  0], dtype=int32),
              learned=array([False, False, False,  True,  True])),)
    """
    if not records:
        raise ValueError('encode_records needs at least one record, received none.')
    if too_long not in ('refuse', 'cut', 'drop'):
        raise ValueError(f"too_long must be 'refuse', 'cut' or 'drop': received {too_long!r}.")
    eos_id = getattr(tokenizer, 'eos_token_id', None) if eos_id is None else eos_id
    chat_template = chat_template or getattr(tokenizer, 'chat_template', None)
    samples = []
    for record in records:
        if record.messages:
            ids, answers = _conversation(tokenizer, record, chat_template, answers_only)
        else:
            ids, answers = _plain(tokenizer, record, eos_id)
        learned = np.zeros(len(ids), bool)
        for start, end in answers if answers_only else [(0, len(ids))]:
            learned[start:end] = True
        sample = Sample(np.asarray(ids, np.int32), learned)
        samples.append(_fitted(record.where, sample, max_tokens, too_long))
    kept = tuple(sample for sample in samples if sample is not None)
    if not kept:
        raise ValueError(f'all {len(samples)} examples have more than max_tokens={max_tokens}.')
    return kept


def _fitted(where: str, sample: Sample, most: int, too_long: str) -> Sample | None:
    count = len(sample.ids)
    if count > most and too_long == 'drop':
        return None
    if count > most and too_long == 'refuse':
        raise ValueError(
            f'{where} has {count} tokens, max_tokens is {most}. Raise it, or say too_long='
            "'cut' or 'drop'."
        )
    cut = Sample(sample.ids[:most], sample.learned[:most])
    if not cut.learned[1:].any():  # the first token follows nothing
        why = f' within the first {most} of its {count} tokens' if count > most else ''
        raise ValueError(f'{where} has nothing to learn{why}: no answer, or one without tokens.')
    return cut


def ids_of(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """The tokens of a text, with what a tokenizer puts around texts or without."""
    if callable(tokenizer):
        out: Any = tokenizer(text, add_special_tokens=special)
        return list(out['input_ids'])
    return tokenizer.encode(text, add_special_tokens=special).ids


_Spans = list[tuple[int, int]]


def _plain(tokenizer: Any, record: Record, eos_id: int | None) -> tuple[list[int], _Spans]:
    """A text, or a prompt and its completion."""
    if eos_id is None:
        raise ValueError('the tokenizer names no end-of-text token: pass eos_id.')
    body = ids_of(tokenizer, record.text or record.prompt + record.completion)
    before = front(tokenizer, record.text or record.prompt + record.completion)
    ids = [*before, *body, eos_id]
    if record.text:
        return ids, [(0, len(ids))]
    start = len(before) + _begins(
        tokenizer,
        record,
        record.prompt,
        body,
        'Put white space in front of the completion, not behind the prompt',
    )
    return ids, [(start, len(ids))]


def front(tokenizer: Any, text: str) -> list[int]:
    """What the tokenizer puts in front of a text (a beginning-of-text token)."""
    bare, dressed = ids_of(tokenizer, text), ids_of(tokenizer, text, special=True)
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return dressed[:start]
    raise ValueError(
        f'the tokens of {text[:40]!r} change with what the tokenizer puts around them: {bare} '
        f'alone, {dressed} with it. Take a tokenizer that leaves texts as they are'
    )


def _begins(tokenizer: Any, record: Record, text: str, ids: list[int], mend: str) -> int:
    """How many tokens a text has that must begin others."""
    own = ids_of(tokenizer, text)
    if ids[: len(own)] != own:
        at = next(i for i, pair in enumerate(itertools.zip_longest(own, ids)) if len({*pair}) > 1)
        raise ValueError(
            f'{record.where}: the tokens of a prompt must not change with what follows, so that '
            f'the model meets them again; here they do from token {at} on, at '
            f'...{text[-20:]!r}. {mend}.'
        )
    return len(own)


def _conversation(
    tokenizer: Any, record: Record, template: str | None, answers_only: bool
) -> tuple[list[int], _Spans]:
    messages = list(record.messages)
    whole = rendered(tokenizer, record, messages, template, False)
    ids = ids_of(tokenizer, whole)
    spans = _answers(tokenizer, record, template, whole) if answers_only else ()
    mend = 'Use another chat template, or answers_only=False'
    return ids, [
        (
            _begins(tokenizer, record, before, ids, mend),
            _begins(tokenizer, record, after, ids, mend),
        )
        for before, after in spans
    ]


def _answers(
    tokenizer: Any, record: Record, template: str | None, whole: str
) -> Iterator[tuple[str, str]]:
    """For each answer, the conversation as rendered up to it, and with it."""
    messages = list(record.messages)
    for i, message in enumerate(messages):
        if message['role'] != 'assistant':
            continue
        before = rendered(tokenizer, record, messages[:i], template, True)
        after = rendered(tokenizer, record, messages[: i + 1], template, False)
        if not after.startswith(before) or not whole.startswith(after):
            raise ValueError(
                f'{record.where}: the chat template renders message {i} in another way when it is '
                'asked for or when more follows, so that the answer cannot be told apart. Use '
                'another chat template, split the conversation, or set answers_only=False.'
            )
        yield before, after


def rendered(
    tokenizer: Any,
    record: Record,
    messages: Sequence[Mapping[str, Any]],
    template: str | None,
    ask: bool,
) -> str:
    """The first messages of a record as text; `ask` ends it where an answer begins."""
    if template is None or not hasattr(tokenizer, 'apply_chat_template'):
        raise ValueError(
            f'{record.where} is a conversation: it needs a transformers tokenizer with a chat '
            'template. Load one of an instruction-tuned model, or pass chat_template.'
        )
    how = {'tokenize': False, 'add_generation_prompt': ask, 'chat_template': template}
    try:
        return tokenizer.apply_chat_template([*messages], **how)
    except Exception as error:  # templates raise what they like
        raise ValueError(
            f'{record.where}: the chat template refuses the first {len(messages)} messages: {error}'
        ) from error
