"""What is compiled for Omniglot: the loss of an outer step, and the accuracy on new tasks.

Images lie on the device beside theta, `(theta, images)`, and tasks are positions among them. All of
the network is trained: phi is `Trainable(target='.')`, and theta says shapes and the start alone.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import few_shot_network as few_shot
import jax
import jax.numpy as jnp
import omniglot_recipes as recipes
import optax
from omniglot_data import pixels
from omniglot_recipes import Recipe

import peftjax as pj
from peftjax import data


class Programs(NamedTuple):
    """An algorithm, ready to be trained.

    Attributes:
      peft: the plan of phi.
      params: theta.
      loss: `loss((theta, images), phi, tasks, key)`, of tasks of positions.
      tx: the outer optimizer.
      step: as from `pj.train_step`.
      judge: `judge((theta, images), phi, tasks, key)`, the accuracy of each task, jitted.
    """

    peft: pj.Peft
    params: Any
    loss: Callable[..., jax.Array]
    tx: optax.GradientTransformation
    step: Any
    judge: Callable[..., jax.Array]


@functools.cache
def programs(recipe: Recipe, steps: int, convolution: str, pooled: bool, seed: int) -> Programs:
    """Those of a run of so many steps, compiled once in a process."""
    own = getattr(few_shot, convolution)
    params = few_shot.parameters(recipe.judged[0], seed)
    network, features = (
        functools.partial(fn, own, pooled=pooled) for fn in (few_shot.network, few_shot.features)
    )
    headless = recipe.algorithm == 'prototypes'
    if headless:
        params = {'layers': params['layers']}
    blank = jnp.ones((2, few_shot.SIZE, few_shot.SIZE, 1))
    peft = pj.attach(pj.Trainable(target='.'), features if headless else network, params, blank)
    if headless:
        loss, one = _prototypes(recipe, peft.wrap(features))
    elif recipe.algorithm == 'anil':
        loss, one = _head_alone(recipe, peft.wrap(features), peft.wrap(few_shot.head))
    else:
        loss, one = _adapting(recipe, peft.wrap(network))
    tx = recipes.outer(recipe, steps)
    return Programs(peft, params, loss, tx, pj.train_step(loss, tx), jax.jit(_each(one)))


def _adapting(recipe: Recipe, forward: Any) -> tuple[Any, Any]:
    """All of the network adapts."""
    inner, tx = recipe.inner, recipes.inner_optimizer(recipe)
    assert inner is not None

    def loss(rows: int | None, params: Any, phi: Any, batch: Any, key: jax.Array) -> jax.Array:
        theta, images = params
        batch = recipes.drawn(batch, rows, key)
        return _wrong(forward(theta, phi, pixels(images, batch.inputs)), batch.labels)

    trained, meta = functools.partial(loss, inner.batch), pj.meta
    if recipe.algorithm == 'reptile':
        learner = meta.reptile(trained, tx, steps=inner.steps)
    else:
        first = recipe.algorithm == 'fomaml'
        learner = meta.maml(trained, tx, steps=inner.steps, first_order=first)
    tested = functools.partial(loss, inner.test_batch)
    adapt = meta.adapter(tested, tx, steps=inner.test_steps)

    def one(params: Any, phi: Any, task: Any, key: jax.Array) -> jax.Array:
        theta, images = params
        own = adapt(params, phi, task.support, key)
        said = forward(theta, own, pixels(images, task.query.inputs))
        return _right(said, task.query.labels)

    return learner.loss, one


def _head_alone(recipe: Recipe, features: Any, head: Any) -> tuple[Any, Any]:
    """What does not adapt sees each image once, not again in every inner step."""
    inner, tx = recipe.inner, recipes.inner_optimizer(recipe)
    assert inner is not None

    def loss(theta: Any, phi: Any, batch: Any, key: jax.Array) -> jax.Array:
        del key  # nothing is drawn
        return _wrong(head(theta, phi, batch.inputs), batch.labels)

    learner = pj.meta.maml(loss, tx, steps=inner.steps, target='head')
    adapt = pj.meta.adapter(loss, tx, steps=inner.test_steps, target='head')

    def seen(params: Any, phi: Any, task: Any) -> data.Episode:
        theta, images = params
        look = lambda half: features(theta, phi, pixels(images, half.inputs))
        return data.Episode(*(half._replace(inputs=look(half)) for half in task))

    def outer(params: Any, phi: Any, tasks: Any, key: jax.Array) -> Any:
        found = jax.vmap(functools.partial(seen, params, phi))(tasks)
        return learner.loss(params[0], phi, found, key)

    def one(params: Any, phi: Any, task: Any, key: jax.Array) -> jax.Array:
        support, query = seen(params, phi, task)
        own = adapt(params[0], phi, support, key)
        return _right(head(params[0], own, query.inputs), query.labels)

    return outer, one


def _prototypes(recipe: Recipe, forward: Any) -> tuple[Any, Any]:
    """Supports and queries are embedded as one batch, as the authors do: one norm for both."""

    def logits(ways: int, params: Any, phi: Any, task: Any) -> jax.Array:
        theta, images = params
        index = jnp.concatenate([task.support.inputs, task.query.inputs])
        found = forward(theta, phi, pixels(images, index))
        few, asked = jnp.split(found, [task.support.inputs.shape[0]])
        return pj.meta.logits(asked, pj.meta.prototypes(few, task.support.labels, ways))

    def loss(params: Any, phi: Any, tasks: Any, key: jax.Array) -> jax.Array:
        del key  # nothing is drawn
        own = functools.partial(logits, recipe.trained[0], params, phi)
        return _wrong(jax.vmap(own)(tasks), tasks.query.labels)

    def one(params: Any, phi: Any, task: Any, key: jax.Array) -> jax.Array:
        del key
        return _right(logits(recipe.judged[0], params, phi, task), task.query.labels)

    return loss, one


def _wrong(logits: Any, labels: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _right(logits: Any, labels: Any) -> jax.Array:
    return (logits.argmax(-1) == labels).mean()


def _each(one: Any) -> Any:
    """Of every task of a batch."""

    def judge(params: Any, phi: Any, tasks: Any, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, tasks.query.labels.shape[0])
        return jax.vmap(one, (None, None, 0, 0))(params, phi, tasks, keys)

    return judge
