"""Prototypical networks: a class is the mean of its examples, in a space that is trained.

Snell et al., Prototypical Networks for Few-shot Learning, 2017, arXiv:1703.05175.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from peftjax._one_pass import wide
from peftjax._types import Array, Phi, PyTree
from peftjax.meta._learner import over_tasks
from peftjax.train import LossFn

Distance = Literal['euclidean', 'cosine']
Embed = Callable[[PyTree, Phi, Any, Array], Array]
"""`embed(params, phi, inputs, key) -> (rows, width)`."""


class Prototypical(NamedTuple):
    """A prototypical network.

    Attributes:
      loss: `loss(params, phi, tasks, key)`, a scalar, for `pj.train_step`: the cross-entropy of the
        queries, its mean over rows and tasks. Tasks are `(support, query)`, each a pair
        `(inputs, labels)`; leaves are `(tasks, rows, ...)`, labels integers from 0 to `ways - 1`.
      adapt: `adapt(params, phi, support, key) -> (ways, width)`, the prototypes of one task.
      classify: `classify(params, phi, prototypes, inputs, key) -> (rows, ways)`, logits. Both are
        jitted.
    """

    loss: LossFn
    adapt: Callable[[PyTree, Phi, Any, Array], Array]
    classify: Callable[[PyTree, Phi, Array, Any, Array], Array]


def prototypical(
    embed: Embed, *, ways: int, distance: Distance = 'euclidean', scale: float = 1.0
) -> Prototypical:
    """A prototypical network of any embedding: phi learns the space, nothing adapts to a task.

    Args:
      embed: `embed(params, phi, inputs, key)`, rows to vectors `(rows, width)`. It is called for
        supports and for queries.
      ways: how many classes a task has.
      distance: squared Euclidean, as in the paper, or cosine, as in matching networks.
      scale: logits are so many times the negative distance, or the cosine. Cosines, and distances
        of vectors of norm one, need something like 10.

    Returns:
      Loss, prototypes of a task, and logits by them.

    Raises:
      ValueError: `ways` is not at least 2, `scale` is not positive, another distance; (when called)
        as of `prototypes` and `logits`.
      TypeError: (when called) tasks or one of their halves are no pair.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> embed = lambda params, phi, x, key: x @ (params['w'] + phi['w'])
      >>> net = prototypical(embed, ways=2)
      >>> params, phi = {'w': jnp.eye(2)}, {'w': jnp.zeros((2, 2))}
      >>> x, labels, key = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([0, 1]), jax.random.key(0)
      >>> means = net.adapt(params, phi, (x, labels), key)
      >>> net.classify(params, phi, means, x, key).argmax(-1).tolist()
      [0, 1]
      >>> one = (x[None], labels[None])
      >>> net.loss(params, phi, (one, one), key).round(3)
      Array(0.127, dtype=float32)

    Reference: Snell et al., 2017, arXiv:1703.05175, equations 1 and 2.
    """
    if ways < 2 or not scale > 0:
        raise ValueError(f'ways must be at least 2 and scale positive: received {ways} and {scale}')
    _check(distance)

    def adapt(params: PyTree, phi: Phi, support: Any, key: Array) -> Array:
        inputs, labels = _halves(support, 'support')
        return prototypes(embed(params, phi, inputs, key), labels, ways)

    def classify(params: PyTree, phi: Phi, means: Array, inputs: Any, key: Array) -> Array:
        return logits(embed(params, phi, inputs, key), means, distance=distance, scale=scale)

    def one(params: PyTree, phi: Phi, task: tuple[Any, Any], key: Array) -> Array:
        support, (inputs, labels) = task[0], _halves(task[1], 'query')
        of_support, of_query = (jax.random.fold_in(key, i) for i in range(2))
        means = adapt(params, phi, support, of_support)
        said = jax.nn.log_softmax(classify(params, phi, means, inputs, of_query))
        return -jnp.take_along_axis(said, labels[:, None], -1).mean()

    return Prototypical(over_tasks(one), jax.jit(adapt), jax.jit(classify))


def prototypes(embeddings: Array, labels: Array, ways: int) -> Array:
    """The mean of each class.

    Args:
      embeddings: `(rows, width)`, floats.
      labels: `(rows,)` integers; rows with another label than 0 to `ways - 1`, as -1, are in no
        class.
      ways: how many classes there are.

    Returns:
      `(ways, width)`, in the dtype of the embeddings, summed in float32 or wider. A class without
      rows is NaN under `jax.jit`, which cannot know.

    Raises:
      ValueError: a class has no rows, where labels have values; shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> prototypes(jnp.array([[0.0], [2.0], [5.0]]), jnp.array([0, 0, 1]), 2).tolist()
      [[1.0], [5.0]]
    """
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            'embeddings must be (rows, width) and labels (rows,): received '
            f'{embeddings.shape} and {labels.shape}'
        )
    member = labels[None] == jnp.arange(ways, dtype=labels.dtype)[:, None]
    counts = member.sum(-1)
    if not isinstance(counts, Tracer) and not counts.all():
        absent = [i for i, count in enumerate(counts.tolist()) if not count]
        raise ValueError(
            f'a support must have an example of each of {ways} classes; it has none of {absent}. '
            'Draw episodes by data.Episodes, or say fewer ways'
        )
    own = wide(embeddings.dtype)
    sums = jnp.matmul(member.astype(own), embeddings.astype(own), precision='highest')
    return (sums / counts.astype(own)[:, None]).astype(embeddings.dtype)


def logits(
    embeddings: Array, prototypes: Array, *, distance: Distance = 'euclidean', scale: float = 1.0
) -> Array:
    """How near vectors are to prototypes.

    Args:
      embeddings: `(rows, width)`, floats.
      prototypes: `(ways, width)`, of the same dtype.
      distance: the negative squared Euclidean distance, or the cosine.
      scale: they are so many times it.

    Returns:
      `(rows, ways)`, float32 or wider.

    Raises:
      ValueError: shapes do not fit, or another distance.

    Example:
      >>> import jax.numpy as jnp
      >>> logits(jnp.array([[3.0, 0.0]]), jnp.array([[1.0, 0.0], [3.0, 1.0]])).tolist()
      [[-4.0, -1.0]]
    """
    _check(distance)
    if embeddings.ndim != 2 or prototypes.ndim != 2 or embeddings.shape[1] != prototypes.shape[1]:
        raise ValueError(
            'embeddings must be (rows, width) and prototypes (ways, width): received '
            f'{embeddings.shape} and {prototypes.shape}'
        )
    own = wide(embeddings.dtype)
    x, means = embeddings.astype(own), prototypes.astype(own)
    if distance == 'cosine':
        return scale * jnp.matmul(_unit(x), _unit(means).T, precision='highest')
    # not by the binomial formula, which cancels where vectors are near each other
    return -scale * jnp.square(x[:, None] - means[None]).sum(-1)


def _unit(x: Array) -> Array:
    """Vectors of norm one; shorter than a millionth they stay short: zero has a derivative."""
    squares = jnp.square(x).sum(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))


def _check(distance: str) -> None:
    if distance not in ('euclidean', 'cosine'):
        raise ValueError(f"distance must be 'euclidean' or 'cosine': received {distance!r}")


def _halves(batch: Any, which: str) -> tuple[Any, Array]:
    if not isinstance(batch, tuple) or len(batch) != 2:
        raise TypeError(
            f'the {which} must be a pair (inputs, labels): received {type(batch).__name__}'
        )
    return batch
