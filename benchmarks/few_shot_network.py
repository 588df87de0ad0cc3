"""The four-layer convolutional network of few-shot image papers, on images of 28 × 28 pixels.

64 filters of 3 × 3, each layer followed by a norm of the batch at hand and ReLU. Strides of two, as
MAML has it on Omniglot (Finn et al., 2017, arXiv:1703.03400, section 5.2), or maxima of 2 × 2, as
prototypical networks have it (Snell et al., 2017, arXiv:1703.05175, section 3.1); the mean of what
is left of the image is 64 numbers.

The norm has no running averages: what a batch holds is judged together, and a query may profit from
the other queries of its task. That is MAML's own way, called transduction in Nichol et al., 2018,
arXiv:1803.02999, section 6.1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

FILTERS, SIZE = 64, 28
Convolution = Callable[[jax.Array, jax.Array, int], jax.Array]


def native(x: jax.Array, kernel: jax.Array, stride: int = 2) -> jax.Array:
    """Padded so that the size is divided by the stride alone."""
    named = ('NHWC', 'HWIO', 'NHWC')
    return lax.conv_general_dilated(x, kernel, (stride, stride), 'SAME', dimension_numbers=named)


def patches(x: jax.Array, kernel: jax.Array, stride: int = 2) -> jax.Array:
    """The same as one product, which stays one where each task has its own kernel."""
    size = -(-x.shape[1] // stride)
    total = max(stride * (size - 1) + 3 - x.shape[1], 0)
    edge = (total // 2, total - total // 2)
    x = jnp.pad(x, ((0, 0), edge, edge, (0, 0)))
    end = stride * (size - 1) + 1
    shifted = [x[:, i : i + end : stride, j : j + end : stride] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, -1) @ kernel.reshape(-1, kernel.shape[-1])


def features(convolution: Convolution, params: Any, x: jax.Array, pooled: bool = False) -> Any:
    """Images `(rows, 28, 28, 1)` to `(rows, 64)`."""
    for layer in params['layers']:
        x = convolution(x, layer['kernel'], 1 if pooled else 2) + layer['bias']
        mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
        x = (x - mean) * lax.rsqrt(variance + 1e-5) * layer['scale'] + layer['shift']
        x = jax.nn.relu(x)
        x = maxima(x) if pooled else x
    return x.mean((1, 2))


def maxima(x: jax.Array) -> jax.Array:
    """Of 2 × 2 pixels; a last odd row or column is left out."""
    rows, height, width, depth = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(rows, height // 2, 2, width // 2, 2, depth).max((2, 4))


def network(convolution: Convolution, params: Any, x: jax.Array, pooled: bool = False) -> Any:
    """Images `(rows, 28, 28, 1)` to logits `(rows, ways)`."""
    return head(params, features(convolution, params, x, pooled))


def head(params: Any, x: jax.Array) -> jax.Array:
    """What `features` gives, to logits `(rows, ways)`."""
    return x @ params['head']['kernel'] + params['head']['bias']


def parameters(ways: int, seed: int = 0) -> Any:
    """Theta as it would begin."""
    layers, keys = [], jax.random.split(jax.random.key(seed), 5)
    for key, width in zip(keys, (1, FILTERS, FILTERS, FILTERS), strict=False):
        kernel = jax.random.normal(key, (3, 3, width, FILTERS)) * (2 / 9 / width) ** 0.5
        zeros, ones = jnp.zeros(FILTERS), jnp.ones(FILTERS)
        layers.append({'kernel': kernel, 'bias': zeros, 'scale': ones, 'shift': zeros})
    head = jax.random.normal(keys[4], (FILTERS, ways)) / FILTERS**0.5
    return {'layers': layers, 'head': {'kernel': head, 'bias': jnp.zeros(ways)}}
