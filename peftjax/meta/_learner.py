"""What a meta-algorithm is, and the mean of its loss over tasks."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from peftjax._types import Array, Phi, PyTree
from peftjax.meta._inner import Adapt
from peftjax.train import LossFn


class Learner(NamedTuple):
    """A meta-algorithm.

    Tasks are split over devices as batches are: by a sharding of their first axis. What is in
    memory at once is all tasks of a batch, or of a part where `train_step` accumulates.

    What is differentiated is phi. FOMAML, Reptile and iMAML say themselves what their gradient is,
    and have none, zero, with respect to theta and tasks; in their losses nothing else may be
    differentiated that a loss closes over.

    Attributes:
      init: `init(phi) -> meta_phi`, what is trained: phi itself, but for Meta-SGD, which puts its
        rates beside it, and Reptile with `carry`, which puts its inner optimizer's state there.
      loss: `loss(params, meta_phi, tasks, key)`, a scalar: the mean over tasks, for
        `pj.train_step`. Tasks are `(support, query)`, leaves `(tasks, ...)`. Task `i` draws from
        `fold_in(key, i)`, whatever the other tasks are.
      adapt: `adapt(params, meta_phi, support, key) -> phi`, as of `adapter`: jitted, of one task.

    Example:
      >>> import jax, jax.numpy as jnp, optax, peftjax as pj
      >>> loss = lambda params, phi, x, key: ((params['w'] + phi['w'] - x) ** 2).mean()
      >>> learner = pj.meta.maml(loss, optax.sgd(0.1), steps=3)
      >>> params, phi = {'w': jnp.ones(2)}, {'w': jnp.zeros(2)}
      >>> tasks = (jnp.ones((4, 5, 2)), jnp.ones((4, 9, 2)))  # four tasks of 5 and 9 rows
      >>> step = pj.train_step(learner.loss, tx := optax.adam(0.1))
      >>> state = pj.start(tx, learner.init(phi), jax.random.key(0))
      >>> state, loss = step(params, state, tasks)
      >>> support, key = jnp.zeros((5, 2)), jax.random.key(1)
      >>> jax.tree.map(jnp.shape, learner.adapt(params, state.phi, support, key))
      {'w': (2,)}
    """

    init: Callable[[Phi], Phi]
    loss: LossFn
    adapt: Adapt


TASKS = 'peftjax_tasks'
"""The axis of tasks, while they are mapped over."""

OneTask = Callable[[PyTree, Phi, tuple[Any, Any], Array], Array]
"""`one(params, phi, (support, query), key)`, a scalar: the loss of one task."""


def over_tasks(one: OneTask) -> Callable[[PyTree, Phi, Any, Array], Array]:
    """The mean of a loss over tasks, all at once."""

    def loss(params: PyTree, phi: Phi, tasks: Any, key: Array) -> Array:
        _check(tasks)

        def alone(task: tuple[Any, Any]) -> Array:
            return one(params, phi, task, jax.random.fold_in(key, lax.axis_index(TASKS)))

        return jax.vmap(alone, axis_name=TASKS)(tasks).mean()

    return loss


Both = Callable[[PyTree, Phi, tuple[Any, Any], Array], tuple[Array, Phi]]
"""`both(params, phi, (support, query), key)`: the loss of one task, and what stands for its
gradient."""


def with_own_gradient(both: Both) -> OneTask:
    """A loss whose gradient with respect to phi is what is said of it."""

    @jax.custom_vjp
    def own(phi: Phi, rest: Any) -> Array:
        params, task, key = rest
        return both(params, phi, task, key)[0]

    def forward(phi: Phi, rest: Any) -> tuple[Array, Phi]:
        params, task, key = rest
        return both(params, phi, task, key)

    def backward(gradient: Phi, by: Array) -> tuple[Phi, None]:
        return jax.tree.map(lambda g: g * by.astype(g.dtype), gradient), None

    own.defvjp(forward, backward)
    return lambda params, phi, task, key: own(phi, (params, task, key))


def parts(trained: Phi, *names: str) -> tuple[Any, ...]:
    """What a learner trains beside phi, and phi.

    Raises:
      ValueError: it is something else, as a phi that did not go through `init`.
    """
    if not isinstance(trained, Mapping) or set(trained) != set(names):
        found = (
            sorted(map(str, trained)) if isinstance(trained, Mapping) else type(trained).__name__
        )
        raise ValueError(
            f'this learner trains a dict of {list(names)}: received {found}. Begin with '
            'learner.init(phi), and adapt from what was trained of that'
        )
    return tuple(trained[name] for name in names)


def _check(tasks: Any) -> None:
    """Refuses what are no tasks.

    Raises:
      TypeError: they are no pair.
      ValueError: the leaves are not as many, or there is no task.
    """
    if not isinstance(tasks, tuple) or len(tasks) != 2:
        found = f'{len(tasks)} of them' if isinstance(tasks, tuple) else type(tasks).__name__
        raise TypeError(f'tasks must be a pair (support, query): received {found}')
    shapes = {
        jax.tree_util.keystr(path): jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tasks)
    }
    counts = {shape[:1] for shape in shapes.values()}
    if len(counts) != 1 or counts <= {(), (0,)}:
        said = ', '.join(f'{shape} at tasks{path}' for path, shape in shapes.items())
        raise ValueError(
            f'leaves of tasks must be (tasks, ...), at least one and as many for all of them: '
            f'received {said}. One task is given with an axis of one in front'
        )
