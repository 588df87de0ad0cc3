"""Eight host devices: phi along theta, for every method, and the models of the zoo on meshes."""

import contextlib
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from blocks import MODELS
from cases import first_everywhere
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from methods_under_test import CONVOLUTION, EVERYWHERE, EXPERTS
from zoo import normal

import peftjax as pj
from peftjax import _paths, models
from peftjax._collectives import collectives

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason='needs eight devices')

TABLES = {'experts': EXPERTS, 'convolution': CONVOLUTION}
CASES = [(method, 'scanned') for method in EVERYWHERE]
CASES += [(method, model) for model, table in TABLES.items() for method in table]
RUN = [
    *((method, 'scanned') for method in (
        'lora_patterns', 'dora', 'ia3', 'adapter_options', 'houlsby_normed', 'prompt',
        'prefix_back', 'tokens', 'bitfit', 'norms', 'everything', 'trained_lora_adapter',
        'ia3_prefix_named',
    )),
    ('lora', 'experts'), ('adapter', 'experts'),
    ('lora', 'convolution'), ('adapter', 'convolution'),
]  # fmt: skip
"""Every method, and every kind of array of phi."""


def mesh_of(kind=AxisType.Auto, **axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


def spread(params, mesh):
    """Every leaf split along its last axes, where they are even."""
    even = lambda name, size: name if size % mesh.shape[name] == 0 and size > 1 else None

    def where(leaf):
        names = ('data', 'model')[-leaf.ndim :]
        own = map(even, names, leaf.shape[leaf.ndim - len(names) :])
        return NamedSharding(mesh, P(*(None,) * (leaf.ndim - len(names)), *own))

    return jax.tree.map(lambda leaf: jax.device_put(leaf, where(leaf)), params)


def close(found, wanted, tolerance=1e-5):
    """Each array to within a part of its largest number, and what the largest of all is rounded by.

    The gradient of a bias of keys is a sum that cancels: as exact as its terms, not as itself.
    """
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    sizes = [float(np.abs(np.asarray(b)).max()) for b in jax.tree.leaves(wanted)]
    rounding = 4 * float(np.finfo(np.float32).eps) * max(sizes)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), sizes, strict=True)
    for a, b, size in pairs:
        atol = tolerance * size + rounding
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol)


def away(phi):
    """The same tree with noise on every number, where it lies."""
    draw = np.random.default_rng(7)
    noisy = lambda x: jnp.asarray(np.asarray(x) + 0.3 * draw.normal(size=x.shape), x.dtype)
    return jax.tree.map(lambda x: jax.device_put(noisy(x), x.sharding), phi)


def attached(method, model):
    case, chosen = MODELS[model], TABLES.get(model, EVERYWHERE)[method]
    return case, pj.attach(chosen, case.fn, case.params, case.inputs)


@pytest.mark.parametrize(('method', 'model'), CASES)
def test_each_array_goes_along_the_axes_that_its_method_tells(method, model):
    """Told of are axes of the sizes that they go along; of arrays of a weight, all are told."""
    case, peft = attached(method, model)
    phi = jax.eval_shape(peft.init, jax.random.key(0), case.params)
    for (keys, part), sites in zip(peft.method.parts, peft.sites, strict=True):
        mine = phi
        for key in keys:
            mine = mine[key]
        for site in sites:
            told = part.axes(site)
            for name, array in mine[site.path].items():
                axes = told[name]
                assert len(axes) == array.ndim
                chosen = [axis for axis in axes if axis is not None]
                assert len(set(chosen)) == len(chosen) and set(site.stack) <= set(chosen)
                for axis, size in zip(axes, array.shape, strict=True):
                    assert axis is None or site.shape[axis] == size


@pytest.mark.parametrize(('method', 'model'), first_everywhere(RUN))
def test_phi_lies_along_theta_and_gives_the_same(method, model):
    """Values at init, outputs and gradients do not depend on the mesh."""
    case, peft = attached(method, model)
    mesh = mesh_of(data=2, model=2)
    params = spread(case.params, mesh)
    there = peft.init(jax.random.key(1), params)
    here = peft.init(jax.random.key(1), case.params)
    close(there, here, 1e-6)
    for leaf, where in zip(
        jax.tree.leaves(there), jax.tree.leaves(peft.shardings(params)), strict=True
    ):
        assert leaf.sharding == where and where.mesh == mesh
    jitted = jax.jit(peft.init, out_shardings=peft.shardings(params))(jax.random.key(1), params)
    close(jitted, here, 1e-6)

    forward = peft.wrap(case.fn)
    loss = lambda phi, params, ids: jnp.sin(forward(params, phi, ids)).mean()
    step = quick.jit(jax.value_and_grad(loss))
    here, there = away(here), away(there)
    wanted = step(here, case.params, case.inputs)
    ids = jax.device_put(case.inputs, NamedSharding(mesh, P('data')))
    close(step(there, params, ids), wanted)


@pytest.mark.parametrize('method', ['lora', 'dora', 'ia3', 'houlsby', 'prefix', 'bitfit'])
def test_the_same_on_explicit_axes(method):
    """The model knows nothing of meshes: its loss runs under automatic axes."""
    case, peft = attached(method, 'scanned')
    forward = peft.wrap(case.fn)
    loss = lambda phi, params, ids: jnp.sin(forward(params, phi, ids)).mean()
    wanted = quick.jit(jax.value_and_grad(loss))(
        away(peft.init(jax.random.key(1), case.params)), case.params, case.inputs
    )
    mesh = mesh_of(AxisType.Explicit, data=2, model=2)
    with jax.set_mesh(mesh):
        params = spread(case.params, mesh)
        phi = away(peft.init(jax.random.key(1), params))
        ids = jax.device_put(case.inputs, NamedSharding(mesh, P('data')))
        auto = jax.sharding.auto_axes(loss, out_sharding=P())
        value, slope = quick.jit(jax.value_and_grad(auto))(phi, params, ids)
    close((value, slope), wanted)
    for one, other in zip(jax.tree.leaves(slope), jax.tree.leaves(phi), strict=True):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


def test_shardings_of_lora_by_hand():
    mesh = mesh_of(data=2, model=4)
    case, peft = attached('lora_all', 'scanned')
    assert peft.shardings(case.params) is None
    where = {path: P() for path in _paths.leaves(case.params)}
    where |= {'layers/up/kernel': P(None, 'data', 'model'), 'layers/down/kernel': P(None, 'model')}
    shapes = _paths.replace(
        case.params,
        {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
            for (path, leaf), spec in zip(
                _paths.leaves(case.params).items(), where.values(), strict=True
            )
        },
    )
    found = jax.tree.map(lambda s: tuple(s.spec), peft.shardings(shapes))
    assert found['layers/up/kernel'] == {'a': (None, 'data'), 'b': (None, None, 'model')}
    assert found['layers/down/kernel'] == {'a': (None, 'model'), 'b': ()}
    assert found['layers/query/kernel'] == {'a': (), 'b': ()}


CONFIG = models.read_decoder_config(
    {
        'model_type': 'llama', 'vocab_size': 64, 'hidden_size': 32, 'num_hidden_layers': 3,
        'num_attention_heads': 8, 'num_key_value_heads': 8, 'intermediate_size': 64,
    }
)  # fmt: skip
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 12)), jnp.int32)
"""Eight rows, one for each device."""

PRESETS = {
    'data': {'data': 8},
    'fsdp': {'fsdp': 8},
    'tensor': {'model': 8},
    'mixed': {'data': 2, 'fsdp': 2, 'model': 2},
}
MODEL = models.Decoder(CONFIG)
LORA = pj.Lora(rank=2, target=models.linears(CONFIG))


def next_token_loss(peft):
    forward = peft.wrap(MODEL.apply_fn)

    def loss(params, phi, ids, key):
        logits = forward(params, phi, ids)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    return loss


@contextlib.contextmanager
def compilations():
    """The programs that are compiled meanwhile."""
    found, log = [], logging.getLogger('jax._src.interpreters.pxla')
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    log.addHandler(handler)
    before, log.propagate = log.propagate, False
    try:
        with jax.log_compiles():
            yield found
    finally:
        log.removeHandler(handler)
        log.propagate = before


def trained(method, mesh=None, steps=20):
    """Losses of a run; nothing moves, and nothing is compiled after the first step."""
    params, ids = MODEL.init(jax.random.key(1), IDS)['params'], IDS
    peft = pj.attach(method, MODEL.apply_fn, params, ids)
    loss = next_token_loss(peft)
    if mesh is not None:
        where = models.decoder_sharding(CONFIG, mesh)
        placed = {p: jax.device_put(x, where(p)) for p, x in _paths.leaves(params).items()}
        params = _paths.replace(params, placed)
        ids = jax.device_put(ids, pj.sharding.batch_sharding(mesh))
        if mesh.are_all_axes_explicit:
            loss = jax.sharding.auto_axes(loss, out_sharding=P())
    tx = optax.adam(3e-3)
    step = pj.train_step(loss, tx)
    state = pj.start(tx, peft.init(jax.random.key(2), params), jax.random.key(3))
    where, losses = jax.tree.map(lambda x: x.sharding, state), []
    if mesh is not None:
        assert jax.tree.leaves(pj.sharding.state_shardings(tx, state.phi)) == jax.tree.leaves(where)
    for i in range(steps):
        with compilations() as found:
            state, value = step(params, state, ids)
        losses.append(float(value))
        assert len(found) == (not i)
    for leaf, before in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        assert leaf.sharding.is_equivalent_to(before, leaf.ndim)
    return losses


@pytest.fixture(scope='module')
def alone():
    """Losses on one device."""
    with jax.numpy_dtype_promotion('standard'):
        return trained(LORA)


@pytest.mark.slow
@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
@pytest.mark.parametrize('preset', PRESETS)
def test_twenty_steps_of_a_decoder_are_those_of_one_device(alone, preset, kind):
    mesh = mesh_of(kind, **PRESETS[preset])
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion('standard'):
        losses = trained(LORA, mesh)
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    assert losses[-1] < losses[0]


def at(leaf, where):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def planned(preset):
    """The collective operations of a step from shapes alone, and what one device holds."""
    mesh = mesh_of(**PRESETS[preset])
    shapes = jax.eval_shape(MODEL.init, jax.random.key(1), IDS)['params']
    where = models.decoder_sharding(CONFIG, mesh)
    params = _paths.replace(shapes, {p: at(x, where(p)) for p, x in _paths.leaves(shapes).items()})
    ids = at(IDS, pj.sharding.batch_sharding(mesh))
    peft = pj.attach(LORA, MODEL.apply_fn, params, ids)
    tx = optax.adam(1e-3)
    phi = jax.eval_shape(peft.init, jax.random.key(0), params)
    phi = jax.tree.map(at, phi, peft.shardings(params))
    fresh = jax.eval_shape(lambda phi: pj.start(tx, phi, jax.random.key(0)), phi)
    state = jax.tree.map(at, fresh, pj.sharding.state_shardings(tx, phi))
    with jax.set_mesh(mesh):
        step = pj.train_step(next_token_loss(peft), tx)
        compiled = step.lower(params, state, ids).compile()
    return collectives(compiled.as_text()), compiled.memory_analysis(), params, (params, state, ids)


def nbytes(leaf, whole=True):
    shape = leaf.shape if whole else leaf.sharding.shard_shape(leaf.shape)
    return 4 * int(np.prod(shape))


@pytest.fixture(scope='module', params=PRESETS)
def plan(request):
    with jax.numpy_dtype_promotion('standard'):
        return request.param, *planned(request.param)


def test_theta_is_never_gathered(plan):
    """What travels: gradients of phi and activations; under `fsdp` a weight of one layer."""
    preset, found, memory, params, arguments = plan
    sizes = {name: [n for one in found for n in one.sizes if one.operation == name]
             for name in {one.operation for one in found}}  # fmt: skip
    leaves = _paths.leaves(params)
    layer = max(nbytes(x) // x.shape[0] for p, x in leaves.items() if '/layers/' in p)
    edge = max(nbytes(x) for p, x in leaves.items() if '/layers/' not in p)
    assert 'all-to-all' not in sizes
    if preset in ('data', 'tensor'):
        assert set(sizes) == {'all-reduce'}
    else:
        split = PRESETS[preset].get('model', 1)
        assert max(sizes['all-gather']) <= max(layer, edge) // split
    if preset == 'data':
        phi = 4 * sum(x.size for x in jax.tree.leaves(_phi()))
        assert phi <= sum(one.nbytes for one in found) < 1.02 * phi
    # a device is given its part of theta, phi and the batch, and no other copy of them
    given = sum(nbytes(x, whole=False) for x in jax.tree.leaves(arguments))
    assert abs(memory.argument_size_in_bytes - given) < 0.01 * given
    split = PRESETS[preset].get('model', 1) * PRESETS[preset].get('fsdp', 1)
    held = sum(nbytes(x, whole=False) for x in leaves.values())
    assert held < 1.05 / split * sum(map(nbytes, leaves.values()))


def _phi():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(1), IDS)['params']
    peft = pj.attach(LORA, MODEL.apply_fn, shapes, IDS)
    return jax.eval_shape(peft.init, jax.random.key(0), shapes)


SMALL = {'up': {'kernel': normal(0, 8, 16)}, 'down': {'kernel': normal(1, 16, 8)}}
RULES = (('up/kernel', P(None, 'model')), ('down/kernel', P('model', None)))
X = normal(2, 8, 8)
MESHES = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (4, 2)}


def small(params, x):
    return x + jnp.tanh(x @ params['up']['kernel']) @ params['down']['kernel']


SMALL_PEFT = pj.attach(pj.Lora(rank=2, target='kernel'), small, SMALL, X)
TX = optax.adam(1e-2)


def small_loss(params, phi, x, key):
    noisy = x + 0.1 * jax.random.normal(key, x.shape)
    return (SMALL_PEFT.wrap(small)(params, phi, noisy) ** 2).mean()


STEP = pj.train_step(small_loss, TX)


def on(count):
    """The small model on so many devices, its data and a fresh state."""
    mesh = jax.make_mesh(
        MESHES[count], ('data', 'model'), (AxisType.Auto,) * 2, devices=jax.devices()[:count]
    )
    params = jax.device_put(SMALL, pj.sharding.by_path(RULES, mesh, SMALL))
    x = jax.device_put(X, pj.sharding.batch_sharding(mesh))
    return params, x, pj.start(TX, SMALL_PEFT.init(jax.random.key(0), params), jax.random.key(1))


@pytest.mark.parametrize('before', MESHES)
def test_a_run_goes_on_with_other_devices(tmp_path, before):
    """Each of 1, 2, 4, 8 devices, after each."""
    with jax.numpy_dtype_promotion('standard'):
        params, x, state = on(before)
        wanted = []
        with pj.Checkpoints(tmp_path, SMALL_PEFT, params) as saved:
            for i in range(6):
                if i == 3:
                    saved.save(state)
                state, value = STEP(params, state, x)
                wanted.append(float(value))
        for after in MESHES:
            params, x, fresh = on(after)
            with pj.Checkpoints(tmp_path, SMALL_PEFT, params) as saved:
                restored = saved.restore(fresh)
            assert restored is not None and restored.step == 3
            state, where = restored.state, jax.tree.map(lambda x: x.sharding, fresh)
            assert jax.tree.map(lambda x: x.sharding, state) == where
            found = []
            for _ in range(3):
                state, value = STEP(params, state, x)
                found.append(float(value))
            np.testing.assert_allclose(found, wanted[3:], rtol=1e-5)


def test_merging_saving_and_loading_keep_shardings(tmp_path):
    params, _, state = on(8)
    phi = away(state.phi)
    merged = SMALL_PEFT.merge(params, phi)
    for one, other in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
    pj.save(tmp_path / 'adapter', SMALL_PEFT, phi, params=params)
    there = pj.load(tmp_path / 'adapter', params=params).phi
    here = pj.load(tmp_path / 'adapter', params=SMALL).phi
    assert jax.tree.map(lambda x: x.sharding, there) == jax.tree.map(lambda x: x.sharding, phi)
    for one, other, third in zip(*map(jax.tree.leaves, (there, here, phi)), strict=True):
        assert np.array_equal(one, third) and np.array_equal(other, third)
        assert len(other.devices()) == 1


def test_rules_that_do_not_fit_are_refused():
    mesh = mesh_of(data=2, model=4)
    wrong = {
        (('up/kernal', P('model')),): 'no leaf matches',
        (('up/kernel', P('tensor')),): "names 'tensor'",
        (('up/kernel', P(None, None, 'model')),): r"tells of 3, 'up/kernel' has shape \(8, 16\)",
        (('kernel', P(('data', 'model'), None)),): None,
    }
    for rules, message in wrong.items():
        if message is None:
            pj.sharding.by_path(rules, mesh, SMALL)
            continue
        with pytest.raises(ValueError, match=message):
            pj.sharding.by_path(rules, mesh, SMALL)
    with pytest.raises(ValueError, match=r"'x' has shape \(6,\), and 'model' splits 6 into 4"):
        pj.sharding.by_path((('x', P('model')),), mesh, {'x': jnp.ones(6)})


def test_rules_over_quantized_leaves():
    mesh = mesh_of(data=2, model=4)
    params = {'kernel': pj.NF4.quantize(normal(0, 16, 512))}
    where = pj.sharding.by_path((('kernel', P('data', 'model')),), mesh, params)
    there = jax.device_put(params, where)
    assert there['kernel'].codes.sharding.shard_shape((16, 256)) == (8, 64)
    apply = lambda params, x: x @ params['kernel']
    peft = pj.attach(pj.Lora(rank=2, target='kernel'), apply, params, normal(1, 4, 16))
    found = jax.tree.map(lambda s: tuple(s.spec), peft.shardings(there))
    assert found == {'kernel': {'a': ('data',), 'b': (None, 'model')}}


def test_a_batch_is_split_over_axes_that_there_are():
    mesh = mesh_of(data=2, model=4)
    spec = lambda *axes: pj.sharding.batch_sharding(mesh, *axes).spec
    assert spec() == spec('data') == spec(['data']) == P('data')
    assert spec(('data', 'model')) == P(('data', 'model'))
    for axes in ('dp', ('data', 'dp')):
        with pytest.raises(ValueError, match="axes of the mesh, .*; got 'dp'|got 'dp'"):
            spec(axes)
    assert pj.sharding.batch_sharding(mesh_of(model=8)).spec == P(None)


def test_several_arrays_of_one_are_whole():
    mesh = mesh_of(data=2, model=4)
    phi = {'x': {'a': jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P('model')))}}
    found = pj.sharding.state_shardings(optax.sm3(0.1), phi)
    where = lambda kept: jax.tree.map(lambda s: tuple(s.spec), kept['x']['a'])
    assert where(found.opt_state[0].mu) == [(), ()] and where(found.opt_state[0].nu) == ('model',)


@pytest.mark.parametrize(
    'method',
    [
        pj.TrainableTokens(target='table', ids=(6, 1)),
        pj.PromptTuning(target='table', length=2),
        pj.PromptTuning(target='table', length=2, initial=(3, 5)),
    ],
    ids=['tokens', 'vocabulary', 'ids'],
)
def test_rows_of_a_table_that_is_split_by_rows_on_explicit_axes(method):
    mesh, alone = mesh_of(AxisType.Explicit, data=2, model=4), {'table': normal(0, 8, 6)}
    split = jax.device_put(alone, NamedSharding(mesh, P('model', 'data')))
    peft = pj.attach(method, lambda p, ids: p['table'][ids], alone, jnp.zeros((2, 3), jnp.int32))
    phi, wanted = (peft.init(jax.random.key(0), params) for params in (split, alone))
    assert jax.tree.map(np.array_equal, phi, wanted) == jax.tree.map(lambda _: True, wanted)
    if isinstance(method, pj.TrainableTokens):
        double = jax.tree.map(lambda leaf: 2 * leaf, wanted)
        merged = peft.merge(split, jax.device_put(double, peft.shardings(split)))
        assert merged['table'].sharding == split['table'].sharding
        np.testing.assert_array_equal(merged['table'], peft.merge(alone, double)['table'])


def test_a_step_leaves_phi_where_it_lay():
    """Also where the partitioner would have it elsewhere: else the second step compiled again."""
    mesh = mesh_of(fsdp=2, model=2, data=2)
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion('standard'):
        params = {'kernel': jax.device_put(normal(0, 8, 8), NamedSharding(mesh, P(None, 'model')))}
        x = jax.device_put(normal(1, 8, 8), pj.sharding.batch_sharding(mesh))
        model = lambda params, x: x @ params['kernel']
        peft = pj.attach(pj.Lora(rank=2, target='kernel'), model, params, x)
        whole = NamedSharding(mesh, P())  # where a quantized weight's is, if its blocks are uneven
        phi = jax.device_put(peft.init(jax.random.key(0), params), whole)
        forward, tx = peft.wrap(model), optax.adam(1e-2)
        step = pj.train_step(lambda p, phi, x, key: (forward(p, phi, x) ** 2).mean(), tx)
        state = pj.start(tx, phi, jax.random.key(1))
        for _ in range(2):
            where = jax.tree.map(lambda leaf: leaf.sharding, state)
            state, _ = step(params, state, x)
            assert jax.tree.map(lambda leaf: leaf.sharding, state) == where
