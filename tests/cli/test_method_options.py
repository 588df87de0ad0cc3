"""A method's own numbers as options: taken by those that have them, written down, read again."""

import pytest
from language import CONFIG

import peftjax as pj
from peftjax.cli import _config, _method_options, _options, _recipes
from peftjax.cli.language import _recipes as language

ENCODER = {one.name: one.build and one.build() for one in _recipes.RECIPES.values()}


def settled(*typed: str, kind: str = 'language', command: str = 'tune'):
    """Options and the method that they ask for."""
    needed = {'tune': ('--out', 'o'), 'plan': ('--model', 'm')}[command]
    options = _options.parse([command, *needed, *typed])
    if kind == 'language':
        return options, language.settle(options, CONFIG)
    return options, _method_options.settle(options, options.method, ENCODER)


@pytest.mark.parametrize('kind', ['language', 'encoder'])
def test_numbers_become_fields(kind):
    _, lora = settled('--rank', '4', '--dropout', '0.1', '--target', 'query|q_proj', kind=kind)
    assert isinstance(lora, pj.Lora)
    assert (lora.rank, lora.alpha, lora.dropout, lora.target) == (4, 8, 0.1, 'query|q_proj')
    _, dora = settled('--method', 'dora', '--alpha', '3', '--target', 'a', 'b', kind=kind)
    assert isinstance(dora, pj.Dora)
    assert (dora.rank, dora.alpha, dora.target) == (8, 3, ('a', 'b'))
    _, adapter = settled('--method', 'adapter', '--reduction', '2.5', kind=kind)
    assert isinstance(adapter, pj.Adapter) and adapter.reduction == 2.5
    for name in ('prompt', 'prefix'):
        assert settled('--method', name, '--virtual-tokens', '7', kind=kind)[1].length == 7
    more = ('--target', 'k_proj', 'down_proj', '--feedforward', 'down_proj')
    _, ia3 = settled('--method', 'ia3', *more, kind=kind)
    assert ia3 == pj.Ia3(target=('k_proj', 'down_proj'), feedforward='down_proj')


def test_a_plan_takes_the_same():
    assert settled('--rank', '2', command='plan')[1].rank == 2


@pytest.mark.parametrize('kind', ['language', 'encoder'])
def test_without_options_a_method_is_its_own(kind):
    recipes = {name: one.build(CONFIG) for name, one in language.RECIPES.items()}
    for name, method in (recipes if kind == 'language' else ENCODER).items():
        assert settled('--method', name, kind=kind)[1] == method


@pytest.mark.parametrize('name', ['lora', 'ia3', 'adapter', 'prefix', 'bitfit'])
@pytest.mark.parametrize('kind', ['language', 'encoder'])
def test_what_is_written_asks_for_the_same_method(tmp_path, kind, name):
    options, method = settled('--method', name, kind=kind)
    _config.write(tmp_path / 'first.toml', options)
    again, same = settled('--config', str(tmp_path / 'first.toml'), kind=kind)
    assert same == method
    _config.write(tmp_path / 'again.toml', again)
    assert (tmp_path / 'first.toml').read_text() == (tmp_path / 'again.toml').read_text()
    written = (tmp_path / 'first.toml').read_text()
    assert ('rank = 8\nalpha = 16\ndropout = 0.0\n' in written) == (name == 'lora')


@pytest.mark.parametrize(
    ('typed', 'message'),
    [
        (('--method', 'prefix', '--rank', '4'),
         '--rank is not for prefix; it is for lora, lora-attention, dora. Leave it out'),
        (('--virtual-tokens', '4'), '--virtual-tokens is not for lora; it is for prompt, prefix.'),
        (('--method', 'ia3', '--reduction', '4'), '--reduction is not for ia3; it is for adapter'),
        (('--feedforward', 'down'), '--feedforward is not for lora; it is for ia3.'),
        (('--method', 'bitfit', '--dropout', '0.1'), '--dropout is not for bitfit; it is for lora'),
    ],
)  # fmt: skip
def test_what_a_method_does_not_take_is_said(typed, message):
    with pytest.raises(ValueError, match='Leave it out, or choose another --method') as error:
        settled(*typed)
    assert message in str(error.value)


def test_the_head_alone_has_no_rate():
    """None is written down, so that what is written is taken."""
    options = _options.parse(['tune', '--out', 'o', '--method', 'frozen'])
    _recipes.settled(options, *_recipes.chosen('frozen'))
    assert options.rate is None
    options.rate = 0.1
    with pytest.raises(ValueError, match='--rate is not for frozen; it is for prompt, .*Leave it'):
        _recipes.settled(options, *_recipes.chosen('frozen'))


def test_the_head_alone_has_no_numbers():
    with pytest.raises(ValueError, match='--rank is not for frozen; it is for lora, dora'):
        settled('--method', 'frozen', '--rank', '4', kind='encoder')


@pytest.mark.parametrize(
    ('typed', 'message'),
    [
        (('--rank', '0'), "must be a whole number from 1 up; got '0'"),
        (('--rank', '8.5'), "must be a whole number from 1 up; got '8.5'"),
        (('--alpha', '-1'), "must be a number above 0; got '-1'"),
        (('--alpha', 'nan'), "must be a number above 0; got 'nan'"),
        (('--reduction', 'half'), "must be a number above 0; got 'half'"),
        (('--dropout', '1'), "must be from 0 to below 1; got '1'"),
        (('--dropout', 'nan'), "must be from 0 to below 1; got 'nan'"),
    ],
)
def test_numbers_out_of_range_are_refused(capsys, typed, message):
    with pytest.raises(SystemExit) as end:
        settled(*typed)
    assert end.value.code == 2 and message in capsys.readouterr().err
