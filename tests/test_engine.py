"""The laws of the engine, on every apply function of the zoo."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from applies import APPLIES, Case
from jax.experimental import io_callback
from quick import jit

import peftjax as pj

pytestmark = pytest.mark.optimized

FEWER = [*APPLIES.wing('applies_control'), *APPLIES.wing('applies_frameworks')[:10]]
FEWER += ['plain', 'tied', 'reshaped', 'experts', 'conv_grouped', 'lookup_vmapped', 'concatenated']

every = pytest.mark.parametrize('name', list(APPLIES))


@pytest.fixture(autouse=True)
def strict_ranks():
    """No operand is broadcast over leading dimensions in silence."""
    with jax.numpy_rank_promotion('raise'):
        yield


@dataclasses.dataclass
class Ready:
    """A case with LoRA attached and its functions jitted."""

    case: Case
    peft: pj.Peft
    fresh: Any
    phi: Any
    calls: list[None]
    compiler: Any

    @functools.cached_property
    def base(self):
        return self.compiler(self.case.base)

    @functools.cached_property
    def forward(self):
        return self.compiler(self.adapted)

    def adapted(self, params, phi, x):
        self.calls.append(None)
        return self.wrapped(params, phi, x)

    def wrapped(self, params, phi, x):
        return self.case.adapted(self.peft, params, phi, x)

    def merged(self, params, phi, x):
        return self.case.base(self.peft.merge(params, phi), x)


@functools.cache
def ready(name: str) -> Ready:
    case = APPLIES[name]
    method = pj.Lora(rank=2, alpha=3.0, target=case.target)
    peft = pj.attach(method, case.fn, case.params, *case.args, **case.kwargs)
    fresh = peft.init(jax.random.key(0), case.params)
    compiler = jax.jit if name in FEWER else jit  # bits may depend on how it is compiled
    return Ready(case, peft, fresh, randomized(fresh), [], compiler)


def randomized(phi: Any) -> Any:
    """Numbers of order one everywhere: at init one factor is zero."""
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) / 2, a.dtype), phi)


def floats(tree: Any) -> list[np.ndarray]:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return [np.asarray(leaf, np.float64) for leaf in leaves]


def close(ours: Any, theirs: Any, tolerance: float) -> None:
    """Asserts that two trees agree, relative to the largest number of each leaf."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    pairs = list(zip(floats(ours), floats(theirs), strict=True))
    assert pairs
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


def score(outputs: Any) -> jax.Array:
    """One number that depends on every output, and is not linear in any."""
    leaves = [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return sum((jnp.sin(1.3 * leaf.astype(jnp.float32)).sum() for leaf in leaves), jnp.zeros(()))


@every
def test_each_leaf_is_served_as_expected(name: str):
    at = ready(name)
    ways = dict(at.peft.served)
    assert set(ways) == set(at.fresh)
    assert {way for mine in ways.values() for way in mine} == set(at.case.served)
    assert all(way in str(at.peft) for way in at.case.served)


@every
def test_at_init_the_output_is_the_bases_bit_for_bit(name: str):
    at = ready(name)
    ours = at.forward(at.case.params, at.fresh, at.case.x)
    base = at.base(at.case.params, at.case.x)
    assert jax.tree.structure(ours) == jax.tree.structure(base)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(base), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@every
def test_forward_is_the_merged_model_and_traces_once(name: str):
    at = ready(name)
    ours = at.forward(at.case.params, at.phi, at.case.x)
    traced = len(at.calls)
    merged = jit(at.merged)(at.case.params, at.phi, at.case.x)
    close(ours, merged, at.case.tolerance)
    at.forward(at.case.params, at.phi, at.case.x)
    assert len(at.calls) == traced == 1


@pytest.mark.parametrize('name', FEWER[::2])
def test_eager_is_jit(name: str):
    at = ready(name)
    eager = at.wrapped(at.case.params, at.phi, at.case.x)
    close(eager, at.forward(at.case.params, at.phi, at.case.x), at.case.tolerance)


@every
def test_gradient_of_donated_phi_is_that_through_the_merge(name: str):
    at = ready(name)
    if not at.case.reverse:
        pytest.skip('JAX cannot differentiate this in reverse mode')
    before = jax.tree.map(np.asarray, at.case.params)
    ours = jit(
        jax.grad(lambda phi, params, x: score(at.wrapped(params, phi, x))),
        donate_argnums=0,
    )
    theirs = jit(jax.grad(lambda phi, params, x: score(at.merged(params, phi, x))))
    donated = jax.tree.map(jnp.copy, at.phi)
    found = ours(donated, at.case.params, at.case.x)
    assert at.case.meshed or all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
    expected = theirs(at.phi, at.case.params, at.case.x)
    close(found, expected, at.case.tolerance)
    assert all(np.abs(leaf).max() > 0 for leaf in floats(found))
    jax.tree.map(np.testing.assert_array_equal, before, at.case.params)


@every
def test_vmap_is_a_loop(name: str):
    at = ready(name)
    if not at.case.mapped:
        pytest.skip('JAX cannot vmap this')
    params, x = at.case.params, at.case.x
    phis = jax.tree.map(lambda one, two: jnp.stack([one, two]), at.phi, at.fresh)
    xs = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), x)
    mapped = lambda *axes: jax.vmap(lambda phi, x: at.wrapped(params, phi, x), axes)
    both = jit(
        lambda phis, xs: (
            mapped(0, None)(phis, x),
            mapped(None, 0)(at.phi, xs),
            mapped(0, 0)(phis, xs),
        )
    )(phis, xs)
    turned = jax.tree.map(lambda leaf: leaf[::-1], x)
    stack = lambda *pairs: jax.tree.map(
        lambda one, two: jnp.stack([one, two]), *(at.forward(params, *pair) for pair in pairs)
    )
    close(both[0], stack((at.phi, x), (at.fresh, x)), at.case.tolerance)
    close(both[1], stack((at.phi, x), (at.phi, turned)), at.case.tolerance)
    close(both[2], stack((at.phi, x), (at.fresh, turned)), at.case.tolerance)


def along_then_back(loss, phi, along):
    """Forward mode over reverse mode."""
    return jax.jvp(jax.grad(loss), (phi,), (along,))[1]


def back_and_back(loss, phi, along):
    """Reverse mode over reverse mode."""

    def slope(phi):
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, jax.grad(loss)(phi), along)))

    return jax.grad(slope)(phi)


def along_only(loss, phi, along):
    """Forward mode."""
    return jax.jvp(loss, (phi,), (along,))[1]


@pytest.mark.slow
@pytest.mark.parametrize('name', FEWER)
def test_jvp_and_grad_of_grad_are_those_through_the_merge(name: str):
    at = ready(name)
    if at.case.reverse and at.case.twice:
        ways = [back_and_back, along_then_back][: 1 + at.case.forward]
    else:
        ways = [along_only]

    @jit
    def derivatives(phi, along, params, x):
        ours = lambda phi: score(at.wrapped(params, phi, x))
        theirs = lambda phi: score(at.merged(params, phi, x))
        return [way(ours, phi, along) for way in ways], ways[0](theirs, phi, along)

    along = jax.tree.map(jnp.cos, at.phi)
    ours, merged = derivatives(at.phi, along, at.case.params, at.case.x)
    for one in ours:
        close(one, merged, 10 * at.case.tolerance)


# What only looks on -------------------------------------------------------------------------------


SEEN = []

LOOKS = {
    'print': lambda value: jax.debug.print('{}', value),
    'callback': lambda value: jax.debug.callback(SEEN.append, value),
    'io_callback': lambda value: io_callback(SEEN.append, None, value),
    'ordered': lambda value: io_callback(SEEN.append, None, value, ordered=True),
}


@pytest.mark.parametrize('method', [pj.Lora(rank=2, target='w'), pj.Ia3(target='w')])
@pytest.mark.parametrize('look', LOOKS.values(), ids=list(LOOKS))
def test_what_is_called_for_its_effect_alone_changes_nothing(look, method):
    def model(params, x, look=look):
        def layer(x, one):
            y = x @ one['w']
            look(y)
            look(one['w'])
            return y + one['b'][None], None

        return jax.lax.scan(layer, x, params)[0]

    shapes = {'w': (3, 4, 4), 'b': (3, 4)}
    params = randomized({name: jnp.zeros(shape) for name, shape in shapes.items()})
    x = jnp.ones((2, 4))
    peft = pj.attach(method, model, params, x)
    silent = lambda params, x: model(params, x, lambda value: None)
    assert peft.sites == pj.attach(method, silent, params, x).sites
    phi = randomized(peft.init(jax.random.key(0), params))
    close(peft.wrap(model)(params, phi, x), silent(peft.merge(params, phi), x), 1e-5)


# What is rounded ----------------------------------------------------------------------------------


ROUNDED = {
    'output': lambda p, x: (10 * x @ p['w']).astype(jnp.int32).astype(jnp.float32),
    'weight': lambda p, x: x @ (10 * p['w']).astype(jnp.int32).astype(jnp.float32),
    'weight alone': lambda p, x: x @ p['w'].astype(jnp.int32).astype(jnp.float32),
    'bias': lambda p, x: x @ p['w'] + p['b'].astype(jnp.int32).astype(jnp.float32)[None],
}


@pytest.mark.parametrize(
    ('method', 'name'),
    [
        *((pj.Lora(rank=2, target='w'), name) for name in ROUNDED),
        *((pj.Ia3(target='w'), name) for name in ('output', 'bias')),
    ],
)
def test_what_is_cast_to_integers_is_adapted_before(method, name):
    model, x = ROUNDED[name], randomized(jnp.zeros((5, 4)))
    params = {'w': 3 * randomized(jnp.zeros((4, 4))), 'b': jnp.array([1.6, -2.7, 0.3, 5.5])}
    peft = pj.attach(method, model, params, x)
    phi = randomized(peft.init(jax.random.key(0), params))
    close(peft.wrap(model)(params, phi, x), model(peft.merge(params, phi), x), 1e-5)


# What is empty ------------------------------------------------------------------------------------


EMPTY = [pj.Lora(rank=2, target='w'), pj.Dora(rank=2, target='w'), pj.Ia3(target='w')]
EMPTY += [pj.Adapter(target='w', reduction=2)]


@pytest.mark.parametrize('method', EMPTY, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize('name', ['plain', 'conv_nhwc', 'conv_grouped'])
def test_an_empty_batch_yields_one(name, method):
    case = APPLIES[name]
    peft = pj.attach(method, case.fn, case.params, *case.args)
    phi = peft.init(jax.random.key(0), case.params)
    rest = [jnp.zeros((0, *case.x.shape[1:])), *case.args[1:]]
    forward = peft.wrap(case.fn)
    wanted = jax.eval_shape(case.fn, case.params, *rest)
    assert jax.eval_shape(forward, case.params, phi, *rest) == wanted


# What is refused ----------------------------------------------------------------------------------


def attach(fn, params, *args, target='w'):
    return pj.attach(pj.Lora(rank=2, target=target), fn, params, *args)


def test_a_leaf_that_is_not_used_is_an_error_with_its_path():
    params = {'used/w': jnp.ones((6, 4)), 'idle/w': jnp.ones((6, 4))}
    with pytest.raises(ValueError, match="'idle/w', which the traced call does not use"):
        attach(lambda p, x: x @ p['used/w'], params, jnp.ones((3, 6)), target='idle')


def test_a_leaf_that_lora_cannot_adapt_is_an_error_with_its_path():
    params = {'w': jnp.ones((6, 4)), 'norm': {'scale': jnp.ones(6)}}
    with pytest.raises(ValueError, match=r"finds only 'norm/scale' \(scale\)"):
        attach(
            lambda p, x: (x * p['norm']['scale'][None]) @ p['w'],
            params,
            jnp.ones((3, 6)),
            target='norm',
        )


def test_a_rank_too_large_is_an_error_with_its_path():
    with pytest.raises(ValueError, match="'head/w' of shape .6, 1.: rank must be at most 1"):
        attach(lambda p, x: x @ p['head/w'], {'head/w': jnp.ones((6, 1))}, jnp.ones((3, 6)))


def test_params_or_phi_of_another_model_are_errors_with_their_paths():
    params, x = {'w': jnp.ones((6, 4))}, jnp.ones((3, 6))
    fn = lambda p, x: x @ p['w']
    peft = attach(fn, params, x)
    phi = peft.init(jax.random.key(0), params)
    with pytest.raises(ValueError, match=r"'w' has shape \(6, 5\), not \(6, 4\)"):
        peft.wrap(fn)({'w': jnp.ones((6, 5))}, phi, x)
    with pytest.raises(ValueError, match="'other' is unknown"):
        peft.wrap(fn)({**params, 'other': x}, phi, x)
    with pytest.raises(ValueError, match="'w/b' is missing"):
        peft.wrap(fn)(params, {'w': {'a': phi['w']['a']}}, x)


def test_what_is_not_an_array_in_params_is_an_error_with_its_path():
    with pytest.raises(TypeError, match="arrays only; 'act' is"):
        attach(lambda p, x: x @ p['w'], {'w': jnp.ones((6, 4)), 'act': jax.nn.relu}, jnp.ones(6))


@pytest.mark.parametrize('method', [pj.Lora(rank=2, target='w'), pj.Ia3(target='w')])
def test_whole_numbers_are_adapted_and_not_merged(method):
    params, x = {'w': jnp.arange(16, dtype=jnp.int8).reshape(4, 4)}, jnp.ones((3, 4))
    fn = lambda p, x: x @ p['w'].astype(x.dtype)
    peft = pj.attach(method, fn, params, x)
    phi = randomized(peft.init(jax.random.key(0), params))
    with pytest.raises(ValueError, match=r"a floating dtype; 'w' is int8 \(1 such .*Convert them"):
        peft.merge(params, phi)
    wide = {'w': params['w'].astype(jnp.float32)}
    peft = pj.attach(method, fn, wide, x)
    out = peft.wrap(fn)(params | wide, phi, x)
    np.testing.assert_allclose(out, fn(peft.merge(wide, phi), x), rtol=1e-5)


def test_what_is_not_an_array_in_a_call_is_an_error_with_its_path():
    params, x, fn = {'w': jnp.ones((6, 4))}, jnp.ones((3, 6)), lambda p, x: x @ p['w']
    peft = attach(fn, params, x)
    phi = peft.init(jax.random.key(0), params)
    with pytest.raises(TypeError, match="arrays only; 'n' is 3. Make an array of it"):
        peft.wrap(fn)({**params, 'n': 3}, phi, x)
    with pytest.raises(TypeError, match="arrays only; 'w/a' is 'lost'. Make an array of it"):
        peft.wrap(fn)(params, {'w': {**phi['w'], 'a': 'lost'}}, x)


# Other functions of the same parameters -----------------------------------------------------------


def test_one_plan_wraps_every_function_of_the_parameters():
    params, x = {'w': jnp.eye(4) + 0.5}, jnp.arange(12.0).reshape(3, 4)
    model = lambda p, x: x @ p['w']
    peft = attach(model, params, x)
    phi = randomized(peft.init(jax.random.key(0), params))
    merged = peft.merge(params, phi)
    loss = lambda p, x, weight, *, power: (weight * model(p, x) ** power).mean()
    ours = peft.wrap(loss)(params, phi, x, 0.5, power=2)
    close(ours, loss(merged, x, 0.5, power=2), 1e-5)


def test_abstract_arguments_make_the_same_plan():
    case = APPLIES['scan_stacked']
    method = pj.Lora(rank=2, target=case.target)
    shapes = jax.eval_shape(lambda *both: both, case.params, case.args)
    planned = pj.attach(method, case.fn, shapes[0], *shapes[1])
    assert planned == pj.attach(method, case.fn, case.params, *case.args)
    assert hash(planned) == hash(pj.attach(method, case.fn, case.params, *case.args))


def test_no_gradient_reaches_theta_unasked_and_none_is_stopped():
    case = APPLIES['plain']
    at = ready('plain')
    loss = lambda params, x: score(at.wrapped(params, at.phi, x))
    by_theta, by_x = jax.grad(loss, (0, 1))(case.params, case.x)
    theirs = jax.grad(lambda params, x: score(at.merged(params, at.phi, x)), (0, 1))
    close((by_theta, by_x), theirs(case.params, case.x), 1e-5)
