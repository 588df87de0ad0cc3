"""What the examples promise as texts; `.ci/run` runs them."""

import ast
import pathlib

import pytest

EXAMPLES = sorted((pathlib.Path(__file__).parents[1] / 'examples').glob('*.py'))


def test_examples_are_numbered():
    assert len(EXAMPLES) >= 7
    assert [path.name[:3] for path in EXAMPLES] == [f'{i:02}_' for i in range(1, len(EXAMPLES) + 1)]


@pytest.mark.parametrize('path', EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_checks_itself(path):
    text = path.read_text()
    assert len(text.splitlines()) < 100
    tree = ast.parse(text)
    before = int(path.name[:2]) - 1
    assert before == 0 or f'What differs from {before:02}' in (ast.get_docstring(tree) or '')
    assert any(isinstance(node, ast.Assert) for node in ast.walk(tree)), (
        'it asserts its own success'
    )
    assert 'argparse' not in text and '/work' not in text
