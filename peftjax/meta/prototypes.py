"""Prototypical networks: a class is the mean of its examples, in a space that is trained.

Snell et al., Prototypical Networks for Few-shot Learning, 2017, arXiv:1703.05175.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from peftjax._counts import whole
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
        `(inputs, labels)`; leaves are `(tasks, rows, ...)`, labels integers from 0 to `ways - 1`,
        or -1 for rows that only fill up.
      adapt: `adapt(params, phi, support, key) -> (ways, width)`, the prototypes of one task.
      classify: `classify(params, phi, prototypes, inputs, key) -> (rows, ways)`, logits. Both are
        compiled once for all tasks of one shape.
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
      ValueError: `ways` is not at least 2, `scale` is not positive and finite, another distance;
        (when called) as of `prototypes` and `logits`.
      TypeError: `ways` is no integer; (when called) tasks or one of their halves are no pair.

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
    ways = whole('ways', ways, 2)
    if not 0 < scale < math.inf:
        raise ValueError(f'scale must be a positive number: received {scale}')
    _check(distance)

    def means_of(params: PyTree, phi: Phi, support: Any, key: Array) -> Array:
        inputs, labels = _halves(support, 'support')
        return prototypes(embed(params, phi, inputs, key), labels, ways)

    jitted = jax.jit(means_of)

    def adapt(params: PyTree, phi: Phi, support: Any, key: Array) -> Array:
        _check_labels(_halves(support, 'support')[1], ways)  # inside they have no values
        return jitted(params, phi, support, key)

    def classify(params: PyTree, phi: Phi, means: Array, inputs: Any, key: Array) -> Array:
        return logits(embed(params, phi, inputs, key), means, distance=distance, scale=scale)

    def one(params: PyTree, phi: Phi, task: tuple[Any, Any], key: Array) -> Array:
        inputs, labels = _halves(task[1], 'query')
        of_support, of_query = (jax.random.fold_in(key, i) for i in range(2))
        means = means_of(params, phi, task[0], of_support)
        return _cross_entropy(classify(params, phi, means, inputs, of_query), labels)

    return Prototypical(over_tasks(one), adapt, jax.jit(classify))


def _cross_entropy(found: Array, labels: Array) -> Array:
    """Its mean over the rows that have a class, zero of none; NaN where a label is another."""
    if labels.shape != found.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f'labels of a query must be integers (rows,): received {labels.dtype} of shape '
            f'{labels.shape} for {found.shape[0]} rows'
        )
    labels, ways = labels.astype(jnp.int32), found.shape[1]
    none = labels == -1
    index = jnp.where(none, 0, jnp.where(labels < 0, ways, labels))
    said = jnp.take_along_axis(jax.nn.log_softmax(found), index[:, None], -1)[:, 0]
    return -jnp.where(none, 0, said).sum() / jnp.maximum((~none).sum(dtype=said.dtype), 1)


def prototypes(embeddings: Array, labels: Array, ways: int) -> Array:
    """The mean of each class.

    Args:
      embeddings: `(rows, width)`, floats.
      labels: `(rows,)` integers from 0 to `ways - 1`; rows with -1 are in no class.
      ways: how many classes there are.

    Returns:
      `(ways, width)`, in the dtype of the embeddings, summed in float32 or wider. Under `jax.jit`,
      which cannot know, a class without rows is NaN, and all are where a label is another.

    Raises:
      ValueError: a class has no rows or a label is another, where labels have values; labels are no
        integers, embeddings no floats, `ways` is not positive, or shapes do not fit.
      TypeError: `ways` is no integer.

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
    if not jnp.issubdtype(embeddings.dtype, jnp.floating):
        raise ValueError(
            f'embeddings must be floats: received {embeddings.dtype}, which has no means. Convert '
            'them'
        )
    ways = whole('ways', ways)
    _check_labels(labels, ways)
    labels = labels.astype(jnp.int32)
    member = labels[None] == jnp.arange(ways, dtype=jnp.int32)[:, None]
    own = wide(embeddings.dtype)
    sums = jnp.matmul(member.astype(own), embeddings.astype(own), precision='highest')
    means = sums / member.sum(-1, dtype=own)[:, None]
    strange = ((labels < -1) | (labels >= ways)).any()
    return jnp.where(strange, jnp.nan, means).astype(embeddings.dtype)


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


def _check_labels(labels: Array, ways: int) -> None:
    """Refuses a support without a class, where its labels have values."""
    if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f'labels must be integers (rows,): received {labels.dtype} of shape {labels.shape}'
        )
    if isinstance(labels, Tracer):
        return
    found = set(np.unique(labels).tolist()) - {-1}
    if strange := sorted(found - set(range(ways))):
        raise ValueError(
            f'labels of a support must be from 0 to {ways - 1}, or -1: received {strange[:5]}. '
            'Count the classes of each task from 0'
        )
    if absent := sorted(set(range(ways)) - found):
        raise ValueError(
            f'a support must have an example of each of {ways} classes; it has none of {absent}. '
            'Draw episodes by data.Episodes, or say fewer ways'
        )


def _halves(batch: Any, which: str) -> tuple[Any, Array]:
    if not isinstance(batch, tuple) or len(batch) != 2:
        raise TypeError(
            f'the {which} must be a pair (inputs, labels): received {type(batch).__name__}'
        )
    return batch[0], jnp.asarray(batch[1])
