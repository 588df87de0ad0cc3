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
      init: of a fresh phi, what is trained: with Reptile the state of its inner optimizer too.
      loss: `loss((theta, images), phi, tasks, key)`, of tasks of positions.
      tx: the outer optimizer.
      step: as from `pj.train_step`.
      judge: `judge((theta, images), phi, tasks, key)`, the accuracy of each task, jitted.
    """

    peft: pj.Peft
    params: Any
    init: Callable[[Any], Any]
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
    headless, init = recipe.algorithm == 'prototypes', lambda phi: phi
    if headless:
        params = {'layers': params['layers']}
    blank = jnp.ones((2, few_shot.SIZE, few_shot.SIZE, 1))
    peft = pj.attach(pj.Trainable(target='.'), features if headless else network, params, blank)
    if headless:
        loss, one = _prototypes(recipe, peft.wrap(features))
    elif recipe.algorithm == 'anil':
        loss, one = _head_alone(recipe, peft.wrap(features), peft.wrap(few_shot.head))
    elif recipe.algorithm == 'reptile':
        init, loss, one = _carrying(recipe, peft.wrap(network))
    else:
        loss, one = _adapting(recipe, peft.wrap(network))
    tx = recipes.outer(recipe, steps)
    return Programs(peft, params, init, loss, tx, pj.train_step(loss, tx), jax.jit(_each(one)))


def _adapting(recipe: Recipe, forward: Any) -> tuple[Any, Any]:
    """All of the network adapts."""
    inner, tx = recipe.inner, recipes.inner_optimizer(recipe)
    assert inner is not None
    loss = functools.partial(_drawn_loss, forward, None)
    first = recipe.algorithm == 'fomaml'
    learner = pj.meta.maml(loss, tx, steps=inner.steps, first_order=first)
    adapt = pj.meta.adapter(loss, tx, steps=inner.test_steps)
    return learner.loss, functools.partial(_after, adapt, forward)


def _carrying(recipe: Recipe, forward: Any) -> tuple[Any, Any, Any]:
    """The same by Reptile, whose inner optimizer goes on from task to task."""
    inner, tx = recipe.inner, recipes.inner_optimizer(recipe)
    assert inner is not None

    def learner(batch: int | None, steps: int) -> Any:
        loss = functools.partial(_drawn_loss, forward, batch)
        return pj.meta.reptile(loss, tx, steps=steps, carry=True)

    trained, tested = learner(inner.batch, inner.steps), learner(inner.test_batch, inner.test_steps)
    return trained.init, trained.loss, functools.partial(_after, tested.adapt, forward)


def _drawn_loss(
    forward: Any, rows: int | None, params: Any, phi: Any, batch: Any, key: jax.Array
) -> jax.Array:
    """The loss of some rows of a batch."""
    theta, images = params
    batch = recipes.drawn(batch, rows, key)
    return _wrong(forward(theta, phi, pixels(images, batch.inputs)), batch.labels)


def _after(adapt: Any, forward: Any, params: Any, phi: Any, task: Any, key: jax.Array) -> jax.Array:
    """The accuracy after adapting to a task."""
    theta, images = params
    own = adapt(params, phi, task.support, key)
    return _right(forward(theta, own, pixels(images, task.query.inputs)), task.query.labels)


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
