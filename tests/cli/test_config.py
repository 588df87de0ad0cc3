"""Options from a TOML file: as if typed, and written so that a run can be made again."""

import json
import math
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftjax.cli import _config, _options

TEXT = st.text(st.characters(exclude_categories=['Cs']))
PLAIN = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXT


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.from_regex('[a-z]+', fullmatch=True), PLAIN | st.lists(PLAIN)))
def test_toml_gives_back_what_was_written(options):
    found = tomllib.loads(_config.text(options))
    assert found == options
    assert json.dumps(found) == json.dumps(options)  # 1, 1.0 and true are not the same


def test_what_toml_cannot_hold_is_refused():
    assert math.isnan(tomllib.loads(_config.text({'a': math.nan}))['a'])
    for value in (None, {}, [[1]], b'a'):
        with pytest.raises(ValueError, match='an option must be text, a number'):
            _config.text({'a': value})


@pytest.fixture
def parse(tmp_path):
    """Parses a command line beside a file."""

    def run(content: str, *typed: str, command: str = 'compare'):
        file = tmp_path / 'run.toml'
        file.write_text(content)
        return _options.parse([command, '--config', str(file), *typed])

    return run


def test_the_command_line_wins_over_the_file(parse):
    options = parse(
        'shots = 3\nseeds = [4, 5]\nmodel = "a \\" b"\noverwrite = true', '--shots', '7'
    )
    assert (options.shots, options.seeds, options.model) == (7, [4, 5], 'a " b')
    assert options.overwrite is True
    assert parse('overwrite = false').overwrite is False
    assert parse('out = "here"', command='tune').out == 'here'  # a required one


def test_both_spellings_of_an_option_are_keys(parse):
    assert parse('data = "a"').train == parse('train = "a"').train == 'a'


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('shotz = 3', "no option 'shotz'. Did you mean 'shots'?"),
        ('text_column = "a"', "no option 'text_column'. Did you mean 'text-column'?"),
        ('qqqq = 3', "no option 'qqqq'. There are: batch, data, epochs, "),
        ('config = "a"', "no option 'config'"),
        ('shots = true', 'shots must be text, a number, or a list of them; got True'),
        ('[shots]', 'shots must be text, a number, or a list of them; got {}'),
        ('overwrite = 1', 'overwrite must be true or false; got 1'),
        ('shots = 0', "must be a whole number from 1 up; got '0'"),
        ('shots = ', 'run.toml must be TOML in UTF-8: Invalid value'),
    ],
)
def test_what_makes_no_sense_is_said(parse, capsys, content, message):
    with pytest.raises(SystemExit) as end:
        parse(content)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_texts_may_follow_options():
    for arguments in (('a', 'b', 'c', '--seed', '3'), ('a', '--seed', '3', 'b', 'c')):
        options = _options.parse(['generate', *arguments])
        assert (options.adapter, options.prompt, options.seed) == ('a', ['b', 'c'], 3)


def test_a_missing_file_is_said(capsys):
    with pytest.raises(SystemExit):
        _options.parse(['compare', '--config', 'none.toml'])
    assert 'no such file: none.toml' in capsys.readouterr().err


def test_no_model_is_written_and_read(parse):
    assert parse('model = ""').model == ''
