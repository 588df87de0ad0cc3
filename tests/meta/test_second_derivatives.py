"""MAML over LoRA in an encoder: second derivatives go through attention's own backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick

import peftjax as pj
from peftjax.models import Encoder, EncoderConfig, mean_pool
from peftjax.models._compute import Compute

TASKS, ROWS, TOKENS, WAYS = 2, 3, 6, 3
CONFIG = EncoderConfig(
    model_type='bert', vocab_size=32, hidden_size=16, num_hidden_layers=2,
    num_attention_heads=2, intermediate_size=24,
)  # fmt: skip


def meta_gradient(attention, first_order=False):
    encoder = Encoder(CONFIG, Compute(attention=attention))
    ids = jax.random.randint(jax.random.key(0), (TASKS, ROWS, TOKENS), 1, CONFIG.vocab_size)
    mask = (jnp.arange(TOKENS)[None] < jnp.array([[3], [6], [4]])).astype(jnp.int32)
    params = jax.tree.map(
        lambda x: 2 * x, quick.jit(encoder.init)(jax.random.key(1), ids[0])['params']
    )
    peft = pj.attach(pj.Lora(rank=2, target='query|value'), encoder.apply_fn, params, ids[0], mask)
    phi, forward = peft.init(jax.random.key(2), params), peft.wrap(encoder.apply_fn)
    head = jax.random.normal(jax.random.key(3), (CONFIG.hidden_size, WAYS))
    phi = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape) / 8, phi)

    def loss(params, phi, rows, key):
        del key
        said = mean_pool(forward(params, phi, rows, mask), mask) @ head
        return optax.softmax_cross_entropy_with_integer_labels(said, jnp.arange(ROWS)).mean()

    learner = pj.meta.maml(loss, optax.sgd(0.5), steps=2, first_order=first_order)
    gradient = quick.jit(jax.grad(learner.loss, argnums=1))
    with jax.numpy_dtype_promotion('standard'):  # of optax
        return gradient(params, phi, (ids, ids[:, :, ::-1]), jax.random.key(4))


@pytest.mark.slow
def test_the_meta_gradient_is_that_of_the_formula():
    plain, found, first = (
        jax.tree.leaves(meta_gradient(*how)) for how in (('plain',), ('fused',), ('plain', True))
    )
    for wanted, own, without in zip(plain, found, first, strict=True):
        size = float(np.abs(wanted).max())
        np.testing.assert_allclose(own, wanted, rtol=0, atol=1e-5 * size)
        assert np.abs(without - wanted).max() > 1e-2 * size
