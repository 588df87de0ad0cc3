"""Reading labelled texts: what comes out, and every way a file can be wrong."""

import json
import subprocess
import sys

import numpy as np
import pytest

from peftjax.data import Examples, Tokens, load_labelled, take

GOOD = [('hi', 'b'), ('yo', 'a'), ('grüß Gott, "you"\nthere', 'b')]


def write(folder, content, name='file.jsonl'):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(folder, rows, name='file.jsonl', columns=('text', 'label')):
    lines = (json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows)
    return write(folder, '\n'.join(lines) + '\n', name)


def check_good(examples):
    assert examples.texts == tuple(text for text, _ in GOOD)
    assert examples.names == ('a', 'b')
    assert examples.labels.dtype == np.int32
    np.testing.assert_array_equal(examples.labels, [1, 0, 1])


def test_jsonl(tmp_path):
    check_good(load_labelled(jsonl(tmp_path, GOOD)))
    check_good(load_labelled(str(jsonl(tmp_path, GOOD, 'FILE.JSONL'))))


def test_csv(tmp_path):
    content = 'label,text,more\r\nb,hi,1\r\na,yo,\r\nb,"grüß Gott, ""you""\nthere",3\r\n'
    check_good(load_labelled(write(tmp_path, content, 'file.csv')))


def test_byte_order_mark_and_blank_lines_are_passed_over(tmp_path):
    content = '\n\n' + jsonl(tmp_path, GOOD).read_text(encoding='utf-8') + '\n \n'
    check_good(load_labelled(write(tmp_path, content.encode('utf-8-sig'))))


def test_unicode_line_separators_stay_inside_a_text(tmp_path):
    rows = [('one\u2028line\x85here', 'a'), ('two', 'b')]
    assert load_labelled(jsonl(tmp_path, rows)).texts[0] == rows[0][0]


def test_columns_can_be_named(tmp_path):
    path = jsonl(tmp_path, GOOD, columns=('sentence', 'class'))
    check_good(load_labelled(path, text='sentence', label='class'))


def test_whole_numbers_are_sorted_by_value(tmp_path):
    examples = load_labelled(jsonl(tmp_path, [('x', 10), ('y', 2), ('z', 10)]))
    assert examples.names == ('2', '10')
    np.testing.assert_array_equal(examples.labels, [1, 0, 1])


def test_test_file_counts_in_the_names_of_the_training_file(tmp_path):
    examples = load_labelled(jsonl(tmp_path, [('hi', 'b')]), names=('a', 'b', 'c'))
    assert examples.names == ('a', 'b', 'c')
    np.testing.assert_array_equal(examples.labels, [1])


def test_labels_unknown_to_the_training_file_are_named(tmp_path):
    path = jsonl(tmp_path, [*GOOD, ('x', 'd'), ('y', 'e')])
    with pytest.raises(
        ValueError, match=r"also occur in the training data.*'d', 'e'. Known: 'a', "
    ):
        load_labelled(path, names=('a', 'b'))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='no such file: .*nowhere.csv'):
        load_labelled(tmp_path / 'nowhere.csv')


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / 'folder.csv').mkdir()
    with pytest.raises(FileNotFoundError, match='no such file: .*folder.csv'):
        load_labelled(tmp_path / 'folder.csv')


def test_columns_without_a_name_may_be_several(tmp_path):
    path = write(tmp_path, 'text,label,,\nhi,a,,\nho,b,,\n', 'f.csv')
    assert load_labelled(path).texts == ('hi', 'ho')


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('f.txt', 'hi', r"must end in .jsonl or .csv: received '.txt'"),
        ('f.jsonl', '', 'is empty'),
        ('f.csv', ' \n', 'is empty'),
        ('f.csv', 'text,label\n', 'holds no examples'),
        ('f.jsonl', 'grüß'.encode('latin-1'), 'must be UTF-8: byte 2 cannot be read'),
        ('f.jsonl', '{"text": "a", "label": "b"}\n{"text": "a"', 'line 2 must be JSON'),
        ('f.jsonl', r'{"text": "a \ud800 b", "label": "b"}', "line 1: 'text' must be Unicode"),
        (
            'f.jsonl',
            r'{"text": "a", "label": "\udfff"}',
            "line 1: 'label' must be Unicode text: ch",
        ),
        ('f.jsonl', '[' * 100_000, 'line 1 must be JSON: .*recursion'),
        ('f.jsonl', '{"label": ' + '9' * 5000 + '}', 'line 1 must be JSON: .*4300 digits'),
        ('f.jsonl', '\n["a", "b"]', 'line 2 must be a JSON object'),
        (
            'f.jsonl',
            '{"body": "a", "label": "b"}',
            "line 1: .*no value for 'text'. Columns found: 'body', 'label'",
        ),
        ('f.csv', 'text,class\na,b\n', "no value for 'label'. Columns found: 'text', 'class'"),
        ('f.csv', 'text;label\na;b\n', "no value for 'text', 'label'. Columns found: 'text;label'"),
        ('f.csv', 'text,label\nx,a\ny\n', "line 3: .*no value for 'label'"),
        ('f.csv', 'text,label\nhi, you,a\n', 'line 2 has more cells than the header has columns'),
        ('f.csv', 'text,label,text\nx,a,y\n', "a name of its own; .* more than one of 'text'. Re"),
        ('f.csv', 'text,label\nx,ask\ny, ask\nz,b\n', "found ' ask' and 'ask'. Write them alike"),
        ('f.csv', 'text,label\nx,a\n"y"z,b\n', 'after line 2: must be CSV'),
        ('f.jsonl', '{"text": " ", "label": "b"}', "line 1: 'text' must be a text that is not"),
        ('f.csv', 'text,label\nx,a\n"",b\n', "line 3: 'text' must be a text that is not empty"),
        ('f.jsonl', '{"text": 3, "label": "b"}', "line 1: 'text' must be .* received 3"),
        ('f.csv', 'text,label\nx, \n', "line 2: 'label' must be a text that is not empty"),
        ('f.jsonl', '{"text": "x", "label": true}', "line 1: 'label' must be .* received True"),
        ('f.jsonl', '{"text": "x", "label": 0.5}', "line 1: 'label' must be .* received 0.5"),
        ('f.csv', 'text,label\nx,a\ny,a\n', "has one class only, 'a'"),
        (
            'f.jsonl',
            '{"text": "x", "label": 1}\n{"text": "y", "label": "a"}',
            'labels must be all text or all whole numbers',
        ),
    ],
)
def test_a_wrong_file_is_told(tmp_path, name, content, message):
    path = write(tmp_path, content, name)
    with pytest.raises(ValueError, match=message) as caught:
        load_labelled(path)
    assert str(path) in str(caught.value)


def test_examples_take_rows():
    examples = Examples(('x', 'y', 'z'), np.array([0, 1, 1]), ('a', 'b')).take([2, 0])
    assert examples.texts == ('z', 'x')
    assert len(examples) == 2
    np.testing.assert_array_equal(examples.labels, [1, 0])


@pytest.mark.parametrize('index', [[False, True], [0.7, 1.2]], ids=['mask', 'halves'])
def test_examples_are_taken_by_position(index):
    examples = Examples(('x', 'y'), np.array([0, 1]), ('a', 'b'))
    tokens = Tokens(np.ones((2, 4), np.int32), np.ones((2, 4), np.int32))
    for taking in (lambda: examples.take(index), lambda: take(tokens, np.array(index), 2)):
        with pytest.raises(TypeError, match='an index must be integers, received'):
            taking()
    assert len(examples.take([])) == 0


def test_examples_refuse_labels_that_do_not_fit():
    with pytest.raises(ValueError, match=r'one integer per text: received shape \(1,\) of int64'):
        Examples(('x', 'y'), np.array([0]), ('a', 'b'))
    with pytest.raises(ValueError, match='positions in names, 0 to 1: received 0 to 2'):
        Examples(('x', 'y'), np.array([0, 2]), ('a', 'b'))


def test_the_wing_imports_neither_jax_nor_transformers():
    code = (
        'import sys, peftjax; before = set(sys.modules); import peftjax.data; '
        'print(*(set(sys.modules) - before))'
    )
    loaded = subprocess.run(
        [sys.executable, '-c', code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert 'peftjax.data._text' in loaded
    assert not {'jax', 'transformers', 'tokenizers'} & set(loaded)
    assert all(m.startswith('peftjax.data') for m in loaded if m.startswith('peftjax'))
