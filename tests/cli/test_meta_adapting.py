"""How `peftjax meta` adapts and judges, on a space of a few numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick

from peftjax import data
from peftjax.cli.meta import _adapt, _curves, _frozen, _ground, _paired, _record
from peftjax.cli.meta._methods import WAYS, Rates
from peftjax.cli.meta._parts import Parts
from peftjax.cli.meta._space import Space

WIDTH, WORDS, WAYS_OF_A_TASK, MOST = 5, 40, 3, 4
RATES, OTHER, SHARPNESS = Rates(0.05, 0.1), Rates(0.3, 0.01), 1.5


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion('standard'):  # of optax
        yield


def world():
    """Theta: each text is a word with a vector; phi moves all vectors through a matrix."""
    table = np.random.default_rng(0).normal(size=(WORDS, WIDTH)).astype(np.float32)
    ids = jnp.arange(WORDS, dtype=jnp.int32)[:, None]
    theta = {'params': jnp.asarray(table), 'ids': ids, 'mask': jnp.ones_like(ids)}
    theta |= {'sharpness': jnp.float32(SHARPNESS)}

    def forward(params, phi, ids, attention_mask):
        del attention_mask  # texts have one word
        return params[ids] @ (jnp.eye(WIDTH) + phi['body'])

    phi = {'body': jnp.asarray(np.random.default_rng(1).normal(size=(WIDTH, WIDTH)) / 4)}
    phi = jax.tree.map(jnp.float32, phi)
    return theta, phi, Space(None, forward, WAYS_OF_A_TASK)  # pyright: ignore[reportArgumentType]


def episodes(tasks, shots=2):
    labels = np.arange(WORDS) % 4
    drawn = data.Episodes(labels, ways=WAYS_OF_A_TASK, shots=shots, queries=5, tasks=tasks, seed=3)
    return next(drawn)


def by_hand(theta, phi, space, tx, episode, steps):
    """The accuracy on one task."""
    support, query = episode
    own = {**phi, **space.begin(theta, phi, support)}
    state = tx.init(own)
    for _ in range(steps):
        grads = jax.grad(space.loss, argnums=1)(theta, own, support, None)
        updates, state = tx.update(grads, state, own)
        own = optax.apply_updates(own, updates)
    return space.accuracy(theta, own, query)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'tx'),
    [('maml', lambda rate: optax.sgd(rate)), ('lora', lambda rate: optax.adam(rate))],
)
def test_each_task_is_adapted_to_by_itself(name, tx):
    theta, phi, space = world()
    drawn = episodes(31)  # 26 fit into a batch of 160 rows
    adapting = _adapt.Adapting(theta, space, WAYS[name], MOST, (31,))
    other, found = adapting.accuracies(phi, (OTHER, RATES), drawn, SHARPNESS, (0, 3, 4))
    assert found.shape == (31, 3) and (other[:, 0] == found[:, 0]).all()

    @quick.jit
    def wanted(rates, episode):
        own = optax.partition(
            {'body': tx(rates[0]), 'head': tx(rates[1])}, {'body': 'body', 'head': 'head'}
        )
        return jnp.stack([by_hand(theta, phi, space, own, episode, n) for n in (0, 3, 4)])

    for i in (0, 15, 16, 30):
        one = jax.tree.map(lambda x, i=i: x[i], drawn)
        np.testing.assert_allclose(found[i], wanted(RATES, one), rtol=1e-6)
        np.testing.assert_allclose(other[i], wanted(OTHER, one), rtol=1e-6)
    assert (found[:, 0] != found[:, 2]).any()
    assert len(adapting.programs._made) == 1
    (few,) = adapting.accuracies(phi, [RATES], drawn, SHARPNESS, (3,))
    assert (few[:, 0] == found[:, 1]).all() and len(adapting.programs._made) == 1
    assert adapting.milliseconds(phi, RATES, drawn, SHARPNESS) > 0


@pytest.mark.parametrize(
    ('backend', 'rows', 'lora', 'full'),
    [('cpu', 5, 20, 1), ('cpu', 200, 1, 1), ('gpu', 5, 120, 10), ('gpu', 100, 20, 10)],
)
def test_an_accelerator_adapts_to_more_tasks_at_once(monkeypatch, backend, rows, lora, full):
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    theta, _, space = world()
    drawn = data.Episode(*[data.Shots(np.zeros((200, rows)), np.zeros((200, rows)))] * 2)
    for name, wanted in (('lora', lora), ('full', full)):
        adapting = _adapt.Adapting(theta, space, WAYS[name], MOST, (120, 200))
        sizes = [len(rates) for (rates, _), _ in adapting._batches([RATES, OTHER], drawn)]
        counts = [count for _, count in adapting._batches([RATES, OTHER], drawn)]
        assert set(sizes) == {wanted} and sum(counts) == 400


def test_before_the_first_step_the_head_is_the_nearest_prototype():
    theta, phi, space = world()
    drawn = episodes(9)
    adapting = _adapt.Adapting(theta, space, WAYS['maml'], MOST, (9,))
    found = adapting.accuracies(phi, [RATES], drawn, SHARPNESS, (0,))[0, :, 0]
    features = space.embed(theta, phi, jnp.arange(WORDS))
    wanted = _frozen.nearest(features, drawn, WAYS_OF_A_TASK)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    looked = _frozen.Features(theta, space).accuracies(phi, drawn, WAYS_OF_A_TASK)
    np.testing.assert_allclose(looked, wanted, rtol=1e-6)


@pytest.mark.parametrize('index', [[5], [0, 3, 17], list(range(2, 40, 3)), list(range(40))])
def test_a_text_is_looked_at_once_and_keeps_its_place(monkeypatch, index):
    theta, phi, space = world()
    monkeypatch.setattr(_ground, 'ROWS', 8)
    seen = []

    def program(theta, phi, some):
        seen.extend(some.tolist())
        return space.embed(theta, phi, jnp.asarray(some))

    found = _ground.encoded(program, theta, phi, np.array(index))
    wanted = np.zeros((index[-1] + 1, WIDTH), np.float32)
    wanted[index] = space.embed(theta, phi, jnp.array(index))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert set(seen) == set(index) and len(seen) == -(-len(index) // 8) * 8


def test_sharpness_and_logistic_regression_look_at_features_alone():
    classes = np.arange(WORDS) % 4
    noise = np.random.default_rng(2).normal(size=(WORDS, WIDTH)) / 50
    features = jnp.asarray(np.eye(4, WIDTH)[classes] / 3 + noise / 5, jnp.float32)
    drawn = episodes(6)
    assert _frozen.sharpness(features, drawn, WAYS_OF_A_TASK) == max(_frozen.SHARPNESS)
    found, took = _frozen.logistic(features, drawn, WAYS_OF_A_TASK, 10.0)
    assert found.shape == (6,) and np.allclose(found, 100, rtol=1e-6) and took > 0
    told = np.random.default_rng(4).permutation(WORDS)  # features that know nothing of labels
    assert _frozen.sharpness(features[told], drawn, WAYS_OF_A_TASK) == min(_frozen.SHARPNESS)
    assert _frozen.logistic(features[told], drawn, WAYS_OF_A_TASK, 10.0)[0].mean() < 80


def test_intervals_are_of_the_mean_over_tasks():
    values = np.random.default_rng(0).normal(70, 8, (200, 2))
    (first, _), means = _record.interval(values), _record.means(values)
    assert first == pytest.approx(1.96 * np.std(values[:, 0], ddof=1) / 200**0.5, abs=1e-3)
    assert means == pytest.approx(values.mean(0), abs=1e-3)
    assert _record.interval(values[:1]) == [None, None]


def test_differences_are_taken_task_by_task():
    rng = np.random.default_rng(0)
    hard, gain = rng.normal(70, 8, (200, 2)), rng.normal(1, 0.5, (200, 2))
    means, halves = _paired.difference(hard + gain, hard)
    assert means == pytest.approx(gain.mean(0), abs=1e-3)
    assert halves == pytest.approx(1.96 * gain.std(0, ddof=1) / 200**0.5, abs=1e-3)
    assert max(halves) < 0.1 < min(_record.interval(hard))  # pyright: ignore[reportArgumentType]


def test_methods_stand_beside_others_where_both_were_judged():
    row = lambda name, shots, *steps: {'method': name, 'ways': 5, 'shots': shots, 'steps': steps}
    records = [
        row('lora', 1, 0, 2, 9),
        row('maml', 1, 0, 9),
        row('nearest', 1, 0),
        row('maml', 5, 0),
    ]
    tasks = {
        ('lora', 5, 1): np.array([[60.0, 70, 80], [62, 72, 82]]),
        ('maml', 5, 1): np.array([[64.0, 81], [66, 83]]),
        ('nearest', 5, 1): np.array([[60.0], [62]]),
        ('maml', 5, 5): np.array([[60.0], [62]]),
    }
    records = [record | {'steps': list(record['steps'])} for record in records]
    beside = _paired.beside(['lora', 'nearest'], records, tasks)
    maml, nearest = beside['lora']
    assert (maml['method'], maml['shots'], maml['steps']) == ('maml', 1, [0, 9])
    assert maml['difference'] == [4, 1] and maml['interval'] == [0, 0]
    assert nearest['steps'] == [0, 2, 9] and nearest['difference'] == [0, -10, -20]
    lora, maml = beside['nearest']
    assert lora['steps'] == [0, 2, 9] and lora['difference'] == [0, 10, 20]
    assert maml['steps'] == [0, 9] and maml['difference'] == [4, 21]
    assert '+4.0 ± 0.0' in _paired.text(beside) and 'above nearest' in _paired.text(beside)


def test_what_makes_no_steps_stands_beside_what_was_judged_once():
    row = lambda name, step: {'method': name, 'ways': 5, 'shots': 1, 'steps': [step]}
    tasks = {('lora', 5, 1): np.array([[70.0], [72]]), ('nearest', 5, 1): np.array([[60.0], [62]])}
    beside = _paired.beside(['lora', 'nearest'], [row('nearest', 0), row('lora', 5)], tasks)
    [nearest], [lora] = beside.values()
    assert (nearest['steps'], nearest['difference']) == ([5], [-10])
    assert (lora['steps'], lora['difference']) == ([5], [10])


def test_two_that_write_the_same_batches_leave_each_once(tmp_path):
    batch = lambda number: np.full((1, 2, 1), float(number), np.float32)
    path, made = tmp_path / 'parts.jsonl', {'jax': '1'}
    one, other = Parts(path, made), Parts(path, made)
    for number in range(3):
        one.add('lora', batch(number))
        other.add('lora', batch(number))
    found = Parts(path, made).of('lora')
    assert [float(one[0, 0, 0]) for one in found] == [0, 1, 2]
    assert Parts(path, {'jax': '2'}).of('lora') == Parts(path, made).of('full') == []


def test_a_picture_shows_single_tasks_and_what_makes_no_steps(tmp_path):
    row = {'ways': 5, 'shots': 1, 'meta': None}
    steps = {'steps': [0, 2], 'accuracy': [60.0, 70.0], 'interval': [None, None]}
    still = {'steps': [0], 'accuracy': [65.0], 'interval': [None]}
    records = [row | still | {'method': 'nearest'}, row | steps | {'method': 'lora'}]
    _curves.draw(tmp_path / 'both.png', records, 'both')
    _curves.draw(tmp_path / 'one.png', records[:1], 'one')
    assert (tmp_path / 'both.png').read_bytes() != (tmp_path / 'one.png').read_bytes()
    looks = _curves._looks([f'method {i}' for i in range(18)])
    assert len(set(looks.values())) == len({color for color, _ in looks.values()}) == 18
    asides = [aside for _, aside in looks.values()]
    assert asides == sorted(asides) and asides[-1] - asides[0] == pytest.approx(_curves.SPREAD)
