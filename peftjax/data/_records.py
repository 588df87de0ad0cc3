"""Files of conversations, questions with answers, or texts, for language models."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from peftjax.data._text import MESSAGES as MESSAGES
from peftjax.data._text import check_characters, jsonl_rows, present, read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One example for a language model: a conversation, a prompt with its completion, or a text.

    Attributes:
      where: the file and line that it comes from, for errors.
      messages: a conversation: `{'role': ..., 'content': ...}` each, as chat templates take them.
      prompt: what comes before the completion.
      completion: the answer to the prompt; empty where there is none.
      text: a text as a whole.
    """

    where: str
    messages: tuple[Mapping[str, Any], ...] = ()
    prompt: str = ''
    completion: str = ''
    text: str = ''


def load_records(
    path: str | os.PathLike[str],
    *,
    messages: str = 'messages',
    prompt: str = 'prompt',
    completion: str = 'completion',
    text: str = 'text',
) -> tuple[Record, ...]:
    """Reads examples for a language model from a `.jsonl` file in UTF-8.

    Every line is a JSON object with one of: messages; prompt and completion; text. The first of
    these that is there counts, and a null is not there; other keys are not looked at.

    Args:
      path: the file.
      messages: the key of conversations.
      prompt: the key of prompts.
      completion: the key of completions.
      text: the key of plain texts.

    Returns:
      The examples in the order of the file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: an unknown extension, not UTF-8, a broken line, no known key, a message without
        role or content, an empty completion, prompt, text or answer, no example at all.

    Example:
      >>> load_records(MESSAGES / 'train.jsonl')[0].text[:22]
      'What number do I ring '
    """
    path = present(path)
    if path.suffix.lower() != '.jsonl':
        raise ValueError(f'{path} must end in .jsonl: received {path.suffix!r}.')
    records = []
    for line, row in jsonl_rows(path, read(path)):
        where = f'{path}, line {line}'
        row = {key: value for key, value in row.items() if value is not None}
        if messages in row:
            records.append(Record(where=where, messages=_messages(where, messages, row[messages])))
        elif prompt in row or completion in row:
            said = [_text(where, key, row.get(key)) for key in (prompt, completion)]
            records.append(Record(where=where, prompt=said[0], completion=said[1]))
        elif text in row:
            records.append(Record(where=where, text=_text(where, text, row[text])))
        else:
            raise ValueError(
                f'{where} needs {messages!r}, or {prompt!r} and {completion!r}, or {text!r}: found '
                f'{", ".join(map(repr, row)) or "no key with a value"}. Say how they are called '
                "here (prompt='question')."
            )
    return tuple(records)


def _text(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'{where}: {key!r} must be a text that is not empty: received {value!r}.')
    check_characters(f'{where}: {key!r}', value)
    return value


def _messages(where: str, key: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(
            f'{where}: {key!r} must be a list of messages, at least one: received {value!r}.'
        )
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get('role'), str):
            raise ValueError(
                f"{where}: message {i} must be an object with a 'role' and a 'content': received "
                f'{message!r}.'
            )
        calls = message.get('tool_calls')  # a call of a tool may stand for the content
        if not calls and 'content' not in message:
            raise ValueError(
                f"{where}: message {i} needs a 'content': found {', '.join(map(repr, message))}."
            )
        if not calls and message['role'] == 'assistant' and not message['content']:
            raise ValueError(f'{where}: message {i} is an answer without content.')
        check_characters(f'{where}: message {i}', json.dumps(message, ensure_ascii=False))
    return tuple(value)
