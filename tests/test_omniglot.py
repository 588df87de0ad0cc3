"""The benchmark on Omniglot, on a few images that the test draws."""

import dataclasses
import functools
import json
import pathlib
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from matplotlib import image

import peftjax as pj
from peftjax import data

HOME = pathlib.Path(__file__).parents[1] / 'benchmarks'
if not (HOME / 'omniglot.py').is_file():
    pytest.skip('the benchmarks are not here', allow_module_level=True)
sys.path.insert(0, str(HOME))
import few_shot_network as few_shot  # noqa: E402
import omniglot  # noqa: E402
import omniglot_data  # noqa: E402
import omniglot_picture  # noqa: E402
import omniglot_programs  # noqa: E402
import omniglot_recipes as recipes  # noqa: E402

pytestmark = pytest.mark.slow
ALPHABETS, EACH, DRAWERS = 7, 3, 12


@pytest.fixture(scope='module')
def drawings(tmp_path_factory):
    """A file like that of the data set: a pattern for each character, with noise."""
    rng, count = np.random.default_rng(0), ALPHABETS * EACH
    patterns, noise = rng.random((count, 1, 28, 28)), rng.random((count, DRAWERS, 28, 28))
    path = tmp_path_factory.mktemp('omniglot') / 'drawings.npz'
    np.savez(
        path,
        images=np.where(0.7 * patterns + 0.3 * noise > 0.5, 255, 0).astype(np.uint8),
        alphabet=np.repeat(np.arange(ALPHABETS, dtype=np.int16), EACH),
        alphabet_names=np.array([f'script {i}' for i in range(ALPHABETS)]),
    )
    return path


def parts(path, **how):
    return omniglot_data.split(path, **{'seed': 0, 'validation': 2, 'test': 2, **how})


def test_no_alphabet_is_on_two_sides(drawings):
    own = parts(drawings, rotated='train')
    assert [len(part.alphabets) for part in own] == [3, 2, 2]
    assert len({name for part in own for name in part.alphabets}) == ALPHABETS
    with np.load(drawings) as found:
        images, names = found['images'], found['alphabet_names'][found['alphabet']]
    for part, turned in zip(own, (4, 1, 1), strict=True):
        mine = images[np.isin(names, part.alphabets)]
        assert len(part.images) == len(part.labels) == turned * mine.shape[0] * DRAWERS
        for row in range(0, len(part.images), 7):
            turn, character = divmod(part.labels[row], mine.shape[0])
            wanted = np.rot90(mine[character, row % DRAWERS], turn)
            np.testing.assert_array_equal(part.images[row], wanted)
    assert parts(drawings, rotated='none').test.alphabets == own.test.alphabets
    assert {parts(drawings, rotated='none', seed=i).test.alphabets for i in range(5)} != {
        own.test.alphabets
    }
    with pytest.raises(ValueError, match='alphabets must be left'):
        parts(drawings, rotated='all', test=5)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('size', [7, 28])
def test_patches_are_a_convolution(stride, size):
    x = jax.random.normal(jax.random.key(0), (2, size, size, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
    found = few_shot.patches(x, kernel, stride)
    np.testing.assert_allclose(found, few_shot.native(x, kernel, stride), atol=2e-5)


def small(algorithm, ways, shots):
    """A recipe with fewer of all."""
    own = PAPERS(algorithm, ways, shots)
    queries = own.judged[2] if algorithm != 'prototypes' else 2
    few = dict(judged=(ways, shots, queries), tasks=2)
    if algorithm == 'prototypes':
        few['trained'] = (6, shots, 2)
    if own.inner is not None:
        steps = min(own.inner.steps, 2)
        few['inner'] = dataclasses.replace(own.inner, steps=steps, test_steps=3)
    return dataclasses.replace(own, **few)


PAPERS = recipes.recipe


def told(made, recipe, drawings):
    """What a step is told: theta and images, phi, tasks."""
    train = parts(drawings, rotated='train').train
    ways, shots, queries = recipe.trained
    tasks = data.Episodes(train.labels, ways=ways, shots=shots, queries=queries, tasks=2, seed=0)
    phi = made.init(made.peft.init(jax.random.key(0), made.params))
    return (made.params, jnp.asarray(train.images)), phi, next(tasks)


@pytest.mark.parametrize('algorithm', recipes.ALGORITHMS)
def test_every_algorithm_makes_a_step(algorithm, drawings):
    recipe = small(algorithm, 5, 1)
    made = omniglot_programs.programs(recipe, 10, 'patches', False, 0)
    params, phi, tasks = told(made, recipe, drawings)
    slope = quick.jit(jax.grad(made.loss, argnums=1))
    with jax.numpy_dtype_promotion('standard'):  # of optax's counts
        found = slope(params, phi, tasks, jax.random.key(1))
    if algorithm == 'reptile':  # whose inner optimizer has counted, and seen gradients
        count, *moments = found['inner']
        assert float(count) == -recipe.inner.steps and min(map(jnp.min, moments)) < 0
        found = found['phi']
    flat = {path: float(jnp.abs(leaf['value']).max()) for path, leaf in found.items()}
    # a bias before a norm changes nothing
    moved = {path for path in flat if not path.endswith('bias') or path.startswith('head')}
    assert all(np.isfinite(size) for size in flat.values())
    assert all(flat[path] > 1e-6 for path in moved), flat


def test_anil_is_that_of_the_library(drawings):
    """Whose inner steps see the images again."""
    recipe = small('anil', 5, 1)
    made = omniglot_programs.programs(recipe, 10, 'patches', False, 0)
    params, phi, tasks = told(made, recipe, drawings)
    forward = made.peft.wrap(functools.partial(few_shot.network, few_shot.patches))

    def loss(params, phi, batch, key):
        said = forward(params[0], phi, omniglot_data.pixels(params[1], batch.inputs))
        return optax.softmax_cross_entropy_with_integer_labels(said, batch.labels).mean()

    plain = pj.meta.maml(loss, optax.sgd(0.4), steps=recipe.inner.steps, target='head')
    one, other = (
        quick.jit(jax.value_and_grad(fn, argnums=1))(params, phi, tasks, jax.random.key(1))
        for fn in (made.loss, plain.loss)
    )
    chex.assert_trees_all_close(one, other, rtol=1e-3, atol=1e-5)


def state(arguments):
    """Where a run that has ended stands, by path."""
    run = omniglot.prepared(omniglot.parser().parse_args(arguments))
    found = omniglot.trained(run)[0]
    leaves = jax.tree_util.tree_leaves_with_path(found._replace(key=jax.random.key_data(found.key)))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize('algorithm', ['prototypes', 'reptile'])
def test_the_same_command_goes_on(algorithm, drawings, tmp_path, monkeypatch, capsys):
    """Cut after ten steps of twelve: the bits, the best phi and the test of the unbroken run."""
    monkeypatch.setattr(recipes, 'recipe', small)

    def told_to(name):
        return [
            '--data', str(drawings), '--algorithm', algorithm, '--steps', '12',
            '--out', str(tmp_path / name), '--validation-alphabets', '2', '--test-alphabets', '2',
            '--validate-every', '4', '--validation-tasks', '8', '--test-tasks', '8',
        ]  # fmt: skip

    def run(name, *more):
        with jax.numpy_dtype_promotion('standard'):  # of optax's counts
            omniglot.main([*told_to(name), *more])
        lines = (tmp_path / name / 'curve.jsonl').read_text().splitlines()
        return [json.loads(line) for line in lines]

    whole = run('whole')
    cut = run('cut', '--minutes', '0')
    assert [row['step'] for row in cut] == [4, 8, 10] and 'goes on' in capsys.readouterr().out
    again = run('cut')
    assert [row['step'] for row in again] == [4, 8, 10, 12, 12] and again[:3] == cut
    seen = lambda rows: [(row['step'], row['validation']) for row in rows if 'validation' in row]
    assert seen(again) == seen(whole) and len(seen(whole)) == 3
    assert again[-1] == whole[-1] and again[-1]['tasks'] == 8
    seconds = [row['seconds'] for row in again if 'seconds' in row]
    assert seconds == sorted(seconds) and seconds[0] > 0
    ends = [state(told_to(name)) for name in ('whole', 'cut')]
    assert ends[0].keys() == ends[1].keys() and all(
        (ends[0][k] == ends[1][k]).all() for k in ends[0]
    )
    assert run('cut') == again  # a run that has ended makes no step and no test again
    with pytest.raises(ValueError, match='seed'):
        run('cut', '--seed', '1')


def test_what_is_recorded_is_told_in_full(drawings, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, 'recipe', small)
    monkeypatch.setattr(omniglot, 'LEAST', 8)
    table = tmp_path / 'table.json'

    def run(*more):
        given = [
            '--data', str(drawings), '--algorithm', 'prototypes', '--validation-alphabets', '2',
            '--test-alphabets', '2', '--validate-every', '4', '--validation-tasks', '8',
            '--test-tasks', '8', '--record', '--results', str(table), *more,
        ]  # fmt: skip
        with jax.numpy_dtype_promotion('standard'):  # of optax's counts
            omniglot.main(given)

    run('--steps', '12', '--out', str(tmp_path / 'a'), '--minutes', '0')
    (part,) = json.loads(table.read_text())
    assert (part['steps'], part['steps_wanted']) == (10, 12)
    run('--steps', '12', '--out', str(tmp_path / 'a'))
    (row,) = json.loads(table.read_text())
    assert row['steps'] == 12 and [point[0] for point in row['curve']] == [4, 8, 12]
    assert row['published'] == 98.8 and row['tested_step'] in (4, 8, 12)
    assert 0 <= row['accuracy'] <= 100 and row['interval'] >= 0 and row['step_ms'] > 0
    assert sum(map(len, row['alphabets'].values())) == ALPHABETS
    with pytest.raises(SystemExit, match='at least 8 tasks'):
        run('--steps', '12', '--out', str(tmp_path / 'a'), '--test-tasks', '7')


def test_curves_are_drawn_of_runs_that_were_validated(tmp_path):
    row = dict(algorithm='maml', ways=5, shots=1, accuracy=98.0, interval=0.5)
    rows = [row | {'curve': [[4, 0.5, 70.0], [8, None, 80.0]]}, row | {'shots': 5, 'curve': []}]
    sizes = []
    for count in (1, 2):
        omniglot_picture.draw(tmp_path / 'a.png', rows[:count])
        sizes.append(image.imread(tmp_path / 'a.png').shape)
    assert sizes[0] == sizes[1]  # no field for what has no line
    omniglot_picture.draw(tmp_path / 'a.png', [rows[0], rows[0] | {'ways': 20}])
    assert image.imread(tmp_path / 'a.png').shape[1] == 2 * sizes[0][1]


def test_reptile_goes_ever_less_of_the_way():
    tx = recipes.outer(PAPERS('reptile', 5, 1), 4)
    back, moves = {'phi': jnp.ones(()), 'inner': [jnp.ones(())]}, []
    state = tx.init(back)
    for _ in range(4):
        move, state = tx.update(back, state)
        moves.append((float(move['phi']), float(move['inner'][0])))
    assert moves == [(-1.0, -1.0), (-0.75, -1.0), (-0.5, -1.0), (-0.25, -1.0)]
