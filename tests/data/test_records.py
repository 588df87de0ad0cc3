"""Files for language models, and the errors in them."""

import json
import pathlib
from typing import Any

import pytest

from peftjax.data import load_records

GSM8K = pathlib.Path(__file__).parents[3] / 'shared/data/gsm8k/test.jsonl'


def written(tmp_path: pathlib.Path, *rows: Any) -> pathlib.Path:
    path = tmp_path / 'f.jsonl'
    path.write_text('\n'.join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_all_three_kinds_are_read_in_order(tmp_path: pathlib.Path):
    talk = [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'ho'}]
    rows = {'messages': talk}, '', {'prompt': 'a', 'completion': ' b'}, {'text': 'c', 'id': 3}
    path = written(tmp_path, *rows)
    one, two, three = load_records(path)
    assert list(one.messages) == talk and not one.prompt
    assert (two.prompt, two.completion, two.where) == ('a', ' b', f'{path}, line 3')
    assert three.text == 'c'


def test_a_null_is_not_there(tmp_path: pathlib.Path):
    """As in the rows of a table with a column for each kind."""
    columns = dict.fromkeys(('messages', 'prompt', 'completion', 'text'))
    rows = [columns | {'text': 'c'}, columns | {'prompt': 'a', 'completion': 'b'}]
    one, two = load_records(written(tmp_path, *rows))
    assert (one.text, one.prompt) == ('c', '') and (two.prompt, two.completion) == ('a', 'b')
    with pytest.raises(ValueError, match='line 1 needs .*: found no key with a value'):
        load_records(written(tmp_path, columns))


@pytest.mark.parametrize(
    ('row', 'message'),
    [
        ('{"text": "a"', 'line 2 must be JSON'),
        ('["a"]', 'line 2 must be a JSON object'),
        ({'question': 'a', 'answer': 'b'}, r"line 2 needs .*found 'question', 'answer'.*prompt="),
        ({'prompt': 'a'}, "line 2: 'completion' must be a text that is not empty: received None"),
        ({'prompt': 'a', 'completion': ' '}, "line 2: 'completion' must be a text that is not em"),
        ({'prompt': ['a'], 'completion': 'b'}, "line 2: 'prompt' must be a text"),
        ({'text': ''}, "line 2: 'text' must be"),
        ({'text': 'a \ud800'}, "line 2: 'text' must be Unicode text: character 3 is half of one"),
        ({'prompt': 'a', 'completion': '\udfff'}, "line 2: 'completion' must be Unicode text"),
        (
            {'messages': [{'role': 'user', 'content': '\udc80'}]},
            'line 2: message 0 must be Unicode',
        ),
        ({'messages': []}, 'line 2: .* at least one'),
        ({'messages': [{'content': 'a'}]}, "line 2: message 0 must be an object with a 'role'"),
        ({'messages': [{'role': 'user'}]}, "line 2: message 0 needs a 'content'"),
        (
            {'messages': [{'role': 'assistant', 'content': ''}]},
            'line 2: message 0 is an answer without content',
        ),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path: pathlib.Path, row: Any, message: str):
    path = written(tmp_path, {'text': 'fine'}, row)
    with pytest.raises(ValueError, match=f'f.jsonl, {message}'):
        load_records(path)


def test_a_file_that_is_not_there_or_empty(tmp_path: pathlib.Path):
    with pytest.raises(FileNotFoundError, match=r'g\.jsonl'):
        load_records(tmp_path / 'g.jsonl')
    with pytest.raises(ValueError, match='is empty'):
        load_records(written(tmp_path, ''))
    (tmp_path / 'g.parquet').write_bytes(b'PAR1')
    with pytest.raises(ValueError, match=r'must end in \.jsonl'):
        load_records(tmp_path / 'g.parquet')


@pytest.mark.skipif(not GSM8K.exists(), reason='GSM8K is not here')
def test_gsm8k():
    records = load_records(GSM8K, prompt='question', completion='answer')
    assert len(records) == 1319 and '####' in records[0].completion
