"""A batch whose rows have adapters of their own: three customers and the base, in one program.

What differs from 14: the stack of phi is run instead of trained, and each row of a batch says which
member it wants. Members come and go while the program stays: the stack has room, and a place
in it is data.
"""

import jax
import jax.numpy as jnp
import numpy as np

import peftjax as pj
from peftjax import models

config = models.read_decoder_config({'model_type': 'llama', 'vocab_size': 64, 'hidden_size': 32,
    'num_hidden_layers': 2, 'num_attention_heads': 4, 'intermediate_size': 48})  # fmt: skip
model = models.Decoder(config)
ids = jax.random.randint(jax.random.key(0), (4, 6), 1, 64)
params = model.init(jax.random.key(1), ids)['params']
peft = pj.attach(pj.Lora(rank=4, target='(q|v)_proj'), model.apply_fn, params, ids)


def customer(seed):
    """What a customer has trained, in earnest."""
    keys = iter(jax.random.split(jax.random.key(seed), 99))
    moved = lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape)
    return jax.tree.map(moved, peft.init(jax.random.key(seed), params))


ann, bob, eve = customer(2), customer(3), customer(4)
bank = pj.stack([pj.base_phi(peft, params), ann, bob], room=8)
traced = []


def apply_fn(*args, **kwargs):
    traced.append(None)
    return model.apply_fn(*args, **kwargs)


forward = jax.jit(pj.mixed(peft, apply_fn))
logits = forward(params, pj.Rows(bank, jnp.array([0, 1, 2, 1])), ids)
alone, base = jax.jit(peft.wrap(model.apply_fn)), jax.jit(model.apply_fn)
for row, phi in enumerate((None, ann, bob, ann)):
    one = ids[row : row + 1]
    want = base(params, one) if phi is None else alone(params, phi, one)
    np.testing.assert_allclose(logits[row], want[0], atol=1e-5)
print('four rows: the base, Ann, Bob, Ann, each as alone')

programs = len(traced)
bank = pj.swap(bank, 3, eve)  # a new customer
bank = pj.swap(bank, 1, customer(5))  # Ann has trained again
logits = forward(params, pj.Rows(bank, jnp.array([3, 1, 3, 0])), ids)
np.testing.assert_allclose(logits[2], alone(params, eve, ids[2:3])[0], atol=1e-5)
print(f'two adapters put in: traced {len(traced) - programs} times again')
assert len(traced) == programs

empty = forward(params, pj.Rows(bank, jnp.array([0, 7, 1, 2])), ids)
print('finite, where one row asks for an empty place:', jnp.isfinite(empty).all((1, 2)).tolist())
assert jnp.isfinite(empty).all((1, 2)).tolist() == [True, False, True, True]

# a cache has its rows on the second axis, and the number of tokens read in common
cache = models.Cache(1, 1, 0, None)
serve = pj.mixed(peft, model.apply_fn, keywords={'cache': cache}, out_axes=(0, cache))
rows = pj.Rows(bank, jnp.array([0, 1, 2, 3]))
said = pj.generate(serve, params, rows, ids, init_cache=model.init_cache, length=5)
third = pj.generate(alone, params, bob, ids[2:3], init_cache=model.init_cache, length=5)
print('generated:', said.tokens.tolist())
assert said.tokens[2].tolist() == third.tokens[0].tolist()
