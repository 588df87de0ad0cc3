"""What the engine costs, against LoRA written into the model by hand."""

import dataclasses
import functools
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
import transformer
from zoo import ids

import peftjax as pj

TOKENS = ids(0, transformer.VOCABULARY, 4, 12)  # 48 rows: as many as no weight is wide
TARGETS = {'q and v': 'qv', 'all linears': transformer.LINEARS}
SCALE = 1.5


@dataclasses.dataclass
class Twins:
    """One model with our LoRA and with LoRA by hand; both are functions of the same phi."""

    params: Any
    phi: Any
    peft: pj.Peft
    ours: Any
    by_hand: Any


@functools.cache
def twins(form: str, names: str, layers: int = 2) -> Twins:
    stacked = form == 'scanned'
    model = getattr(transformer, form)
    params = transformer.parameters(layers, stacked)
    target = rf'/({"|".join(TARGETS[names])})/kernel'
    method = pj.Lora(rank=4, alpha=4 * SCALE, target=target)
    peft = pj.attach(method, model, params, TOKENS)
    pair = lambda phi, *path: (phi['/'.join(('layers', *path, 'kernel'))], SCALE)

    def by_hand(params, phi, tokens):
        if stacked:
            lora: Any = {name: pair(phi, name) for name in TARGETS[names]}
        else:
            lora = [
                {name: pair(phi, str(i), name) for name in TARGETS[names]} for i in range(layers)
            ]
        return model(params, tokens, lora)

    phi = jax.tree.map(lambda a: a + 0.1, peft.init(jax.random.key(0), params))
    return Twins(params, phi, peft, peft.wrap(model), by_hand)


def step(forward: Any) -> Any:
    """The gradient step: loss and gradient of phi."""

    def loss(phi, params, tokens):
        logits = jax.nn.log_softmax(forward(params, phi, tokens))
        return -jnp.take_along_axis(logits, tokens[..., None], -1).mean()

    return jax.value_and_grad(loss)


every = pytest.mark.parametrize('names', TARGETS)
forms = pytest.mark.parametrize('form', ['scanned', 'unrolled'])


@every
@forms
def test_a_gradient_step_costs_what_it_costs_by_hand(form: str, names: str):
    pair = twins(form, names)
    args = (pair.phi, pair.params, TOKENS)
    ours, by_hand = (jax.jit(step(f)).lower(*args).compile() for f in (pair.ours, pair.by_hand))
    for one, other in zip(
        jax.tree.leaves(ours(*args)), jax.tree.leaves(by_hand(*args)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())
    flops = [compiled.cost_analysis()['flops'] for compiled in (ours, by_hand)]
    memory = [compiled.memory_analysis().temp_size_in_bytes for compiled in (ours, by_hand)]
    assert flops[0] <= 1.005 * flops[1]
    assert memory[0] <= 1.005 * memory[1]


def shapes(jaxpr: Any) -> list[tuple[int, ...]]:
    """The shapes of all results of dots, inside and out."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == 'dot_general':
            found.append(tuple(eqn.outvars[0].aval.shape))
        for inner in jex.jaxprs_in_params(eqn.params):
            found += shapes(inner)
    return found


@forms
def test_no_dot_makes_the_gradient_of_a_weight(form: str):
    pair = twins(form, 'all linears')
    made = shapes(jax.make_jaxpr(step(pair.ours))(pair.phi, pair.params, TOKENS).jaxpr)
    width, inner = transformer.WIDTH, transformer.INNER
    for shape in [(width, width), (width, inner), (inner, width)]:
        assert shape not in made
    merged = lambda params, phi, tokens: transformer.unrolled(pair.peft.merge(params, phi), tokens)
    if form == 'unrolled':
        made = shapes(jax.make_jaxpr(step(merged))(pair.phi, pair.params, TOKENS).jaxpr)
        assert (width, inner) in made


def test_theta_is_an_argument_and_no_constant():
    def length(vocabulary: int) -> int:
        pair = twins('unrolled', 'q and v')
        params = {**pair.params, 'embed': jnp.zeros((vocabulary, transformer.WIDTH))}
        model = transformer.unrolled
        peft = pj.attach(pair.peft.method, model, params, TOKENS)
        text = jax.jit(step(peft.wrap(model))).lower(pair.phi, params, TOKENS).as_text()
        return len(text)

    assert abs(length(20) - length(80)) < 100


def equations(jaxpr: Any) -> int:
    """How many equations a jaxpr has, inside and out."""
    inner = [inner for eqn in jaxpr.eqns for inner in jex.jaxprs_in_params(eqn.params)]
    return len(jaxpr.eqns) + sum(map(equations, inner))


def test_a_deep_model_is_traced_once_and_gets_few_equations_more():
    layers, calls = 32, []
    params = jax.eval_shape(lambda: transformer.parameters(layers, False))

    def model(params, tokens):
        calls.append(None)
        return transformer.unrolled(params, tokens)

    peft = pj.attach(pj.Lora(rank=4, target='/[qv]/kernel'), model, params, TOKENS)
    phi = jax.eval_shape(lambda: peft.init(jax.random.key(0), params))
    base = equations(jax.make_jaxpr(transformer.unrolled)(params, TOKENS).jaxpr)
    calls.clear()
    ours = equations(jax.make_jaxpr(peft.wrap(model))(params, phi, TOKENS).jaxpr)
    assert len(calls) == 1
    by_hand = 2 * layers * len(('dot', 'dot', 'add'))
    shaping = 2 * layers * 12
    assert base + by_hand <= ours <= base + by_hand + shaping
