"""Folders of `peftjax meta`, put together by the benchmark on CLINC150."""

import json
import pathlib
import sys

import numpy as np
import pytest

from peftjax.cli.meta import _paired
from peftjax.cli.meta._results import Found

HOME = pathlib.Path(__file__).parents[1] / 'benchmarks'
if not (HOME / 'clinc_table.py').is_file():
    pytest.skip('the benchmarks are not here', allow_module_level=True)
sys.path.insert(0, str(HOME))
import clinc_table  # noqa: E402  # pyright: ignore[reportMissingImports]

FILES = {name: f'here/{name}.jsonl' for name in ('train', 'valid', 'test')}
OPTIONS = {**dict.fromkeys(clinc_table.BY_SHAPE), **FILES, 'seed': 0, 'episodes': 2}


def folder(*keys, versions='1', examples='a', **options):
    """What a run of these methods and shapes left."""
    rng = np.random.default_rng(0)
    records = [
        {'method': method, 'ways': ways, 'shots': shots, 'steps': [0, 5]}
        for method, ways, shots in keys
    ]
    tasks = {key: rng.uniform(0, 100, (2, 2)) for key in keys}
    return Found(OPTIONS | options, {'jax': versions}, examples, records, tasks)


def resumed(*keys):
    """The same, gone on with under another version."""
    found = folder(*keys)
    return found._replace(records=[row | {'versions': {'jax': '2'}} for row in found.records])


def beside(found):
    return _paired.beside(['lora'], found.records, found.tasks)


LORA, MAML, MORE = ('lora', 5, 1), ('maml', 5, 1), ('maml', 5, 5)


def test_methods_and_shapes_of_several_folders_come_together():
    one, other, third = folder(MORE, meta_shots=1), folder(LORA), folder(MAML)
    found = clinc_table.joined({'a': one, 'b': other, 'c': third})
    assert [(row['method'], row['shots']) for row in found.records] == [
        ('lora', 1), ('maml', 1), ('maml', 5),
    ]  # fmt: skip
    assert found.options == {**FILES, 'seed': 0}
    assert found.shapes['5-way 5-shot']['meta_shots'] == 1
    assert found.shapes['5-way 1-shot']['meta_shots'] is None
    said = json.loads(clinc_table.json_of(found, beside(found)))
    assert said['results'] == found.records and said['versions'] == {'jax': '1'}
    assert said['options'] == {'seed': 0, **{name: f'{name}.jsonl' for name in FILES}}
    (maml,) = said['beside_lora']
    wanted = (third.tasks[MAML] - other.tasks[LORA]).mean(0)
    assert maml['method'] == 'maml' and maml['difference'] == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize(
    ('other', 'said'),
    [
        (folder(MAML, seed=1), 'a was run with seed 0, b with 1'),
        (folder(MORE, seed=1), 'a was run with seed 0, b with 1'),
        (folder(MAML, episodes=9), 'a was run on 5-way 1-shot tasks with episodes 2, b with 9'),
        (folder(MAML, versions='2'), "a was made with jax '1', b with '2'"),
        (folder(MAML, examples='b'), "a was made of examples 'a', b with 'b'"),
        (resumed(MAML), "a was made with jax '1', b with '2'"),
        (folder(MAML, LORA), 'a and b both have lora on 5-way 1-shot tasks'),
    ],
)
def test_what_cannot_be_compared_is_refused(other, said):
    with pytest.raises(ValueError, match=said):
        clinc_table.joined({'a': folder(LORA), 'b': other})


def test_methods_are_compared_after_the_steps_that_both_have():
    some, fresh = folder(LORA, steps=[0, 5]), folder(MAML, steps=[0, 5])
    maml = fresh._replace(
        options=fresh.options | {'steps': [5, 10]},
        records=[fresh.records[0] | {'steps': [5, 10]}],
    )
    found = clinc_table.joined({'a': some, 'b': maml})
    assert 'steps' not in found.options and 'steps' not in found.shapes['5-way 1-shot']
    (own,) = beside(found)['lora']
    wanted = maml.tasks[MAML][:, 0] - some.tasks[LORA][:, 1]
    assert own['steps'] == [5]
    assert own['difference'] == pytest.approx([wanted.mean()], abs=1e-3)


def test_times_can_be_left_out():
    meta = {'learner': 'maml', 'seconds': 3.0, 'compile_seconds': 1.0}
    record = {'method': 'maml', 'milliseconds': 2.0, 'compile_seconds': 4.0, 'meta': meta}
    nothing = {'milliseconds': None, 'compile_seconds': None}
    told = {'learner': 'maml', 'seconds': None, 'compile_seconds': None}
    assert clinc_table.untimed(record) == {'method': 'maml', **nothing, 'meta': told}
    assert clinc_table.untimed(record | {'meta': None})['meta'] is None
