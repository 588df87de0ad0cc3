"""Training phi: a state and a pure, jitted, donated step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from peftjax._beside import beside, on_a_mesh
from peftjax._counts import whole
from peftjax._one_pass import wide
from peftjax._scalar import scalar
from peftjax._types import Array, Phi, PyTree
from peftjax.losses import Loss

LossFn = Callable[[PyTree, Phi, Any, Array], Array | Loss]
"""`loss_fn(params, phi, batch, key)` to a scalar, or to a `Loss` whose mean is minimized."""


class Best(NamedTuple):
    """The best phi so far, by the evaluations of `KeepBest`.

    Attributes:
      phi: copies; phi of the start before the first evaluation.
      value: float32, what it was evaluated to; NaN before the first evaluation.
      step: int32, after how many batches.
      stale: int32, how many evaluations in a row have found nothing better since.
    """

    phi: Phi
    value: Array
    step: Array
    stale: Array


class TrainState(NamedTuple):
    """All that changes while phi is trained.

    Attributes:
      phi: the trained parameters.
      opt_state: of the optimizer, over phi only.
      step: int32, the number of batches seen.
      key: PRNG key; each step draws from `fold_in(key, step)`.
      skipped: int32, how many of the steps made no update because it was not finite.
      best: the best phi so far, where it is kept; steps leave it as it is.
    """

    phi: Phi
    opt_state: optax.OptState
    step: Array
    key: Array
    skipped: Array
    best: Best | None = None


Step = Callable[[PyTree, TrainState, Any], tuple[TrainState, Array]]
"""`step(params, state, batch) -> (state, loss)`."""


def start(
    tx: optax.GradientTransformation, phi: Phi, key: Array, *, keep_best: bool = False
) -> TrainState:
    """The state before the first step.

    Args:
      tx: the optimizer.
      phi: as from `Peft.init`.
      key: typed PRNG key, for dropout and whatever else a loss draws.
      keep_best: whether the state has a place for the best phi, as `KeepBest` needs.

    Returns:
      The state; phi is donated with it, at the first step, the key is copied. What does not lie on
      the mesh of phi is copied to it, so that the first step finds everything where the later ones
      do.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> state = start(optax.sgd(0.1), {'kernel': {'a': jnp.ones(2)}}, jax.random.key(0))
      >>> int(state.step), int(state.skipped)
      (0, 0)
    """
    count = lambda: jnp.zeros((), jnp.int32)  # each a buffer of its own: the state is donated
    best = None
    if keep_best:
        value, own = jnp.full((), jnp.nan, jnp.float32), jax.tree.map(jnp.copy, phi)
        best = Best(own, value, count(), count())
    state = TrainState(phi, tx.init(phi), count(), jnp.copy(key), count(), best)
    return beside(_apart(state), phi)


def _apart(state: TrainState) -> TrainState:
    """Every array once, and none of another's: optimizers keep phi itself, or a key of their own.

    What they made of arrays of phi is large, and theirs to give: it is not copied.
    """
    seen: set[int] = set()
    shapes = {jnp.shape(leaf) for leaf in jax.tree.leaves(state.phi)}

    def own(leaf: Any) -> Any:
        shape = jnp.shape(leaf)
        known = id(leaf) in seen or not shape or shape not in shapes
        seen.add(id(leaf))
        return jnp.copy(leaf) if known else leaf

    return jax.tree.map(own, state)


def train_step(loss_fn: LossFn, tx: optax.GradientTransformation, *, accumulate: int = 1) -> Step:
    """Makes one jitted update of phi; theta is an argument and gets no gradient.

    A step whose loss, or the norm of whose gradient, or whose new phi is not finite makes no
    update: phi and the optimizer's state stay as they were, bit for bit, and `state.skipped`
    counts it.

    Args:
      loss_fn: `loss_fn(params, phi, batch, key)` to a scalar, or to a `Loss`, whose mean is
        minimized.
      tx: the optimizer. One that asks for it is told the loss, as `value`; what else it may ask
        for, such as the `value_fn` of a line search, a step does not have.
      accumulate: how many parts a batch has: its leaves are `(accumulate, ...)`. Their gradients
        are summed one part after the other, so that activations of one part alone are held. The
        mean is that of the whole batch: by the counts of a `Loss`; scalars count alike. Each part
        draws from a key of its own.

    Returns:
      `step(params, state, batch) -> (state, loss)`. The state is donated: use the new one.

    Raises:
      ValueError: `accumulate` is not positive, or (from the step) a leaf of a batch has not so
        many parts, or there is no phi.
      TypeError: `accumulate` is no integer, or (from the step) the loss is neither a scalar nor a
        `Loss`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, peftjax as pj
      >>> params, x = {'kernel': jnp.ones((3, 4))}, jnp.ones((2, 3))
      >>> model = lambda params, x: x @ params['kernel']
      >>> forward, phi = pj.lora_wrap(
      ...     model, params, x, key=jax.random.key(0), rank=2, target='kernel')
      >>> loss_fn = lambda params, phi, x, key: (forward(params, phi, x) ** 2).mean()
      >>> tx = optax.adam(1e-1)
      >>> step, state = pj.train_step(loss_fn, tx), pj.start(tx, phi, jax.random.key(1))
      >>> losses = []
      >>> for _ in range(3):
      ...     state, loss = step(params, state, x)
      ...     losses.append(float(loss))
      >>> losses[0] > losses[2]
      True
    """

    gradient, parts = _gradient(loss_fn), whole('accumulate', accumulate)
    if parts > 1:
        gradient = _accumulated(gradient, parts)
    informed = optax.with_extra_args_support(tx)

    def step(params: PyTree, state: TrainState, batch: Any) -> tuple[TrainState, Array]:
        if not jax.tree.leaves(state.phi):
            raise ValueError('a step trains phi; there is nothing in it')
        key = jax.random.fold_in(state.key, state.step)
        found, grads = gradient(params, state.phi, batch, key)
        loss, grads = found.mean, jax.tree.map(functools.partial(_mean, found), grads, state.phi)
        good = jnp.isfinite(loss) & jnp.isfinite(_square(grads))
        updates, opt_state = informed.update(grads, state.opt_state, state.phi, value=loss)
        phi: Any = optax.apply_updates(state.phi, updates)  # optax has a narrower type for trees
        good &= _finite(phi)
        # a choice, not a branch: a GPU would wait for the host to learn which way to go
        keep = lambda old, new: jnp.where(good, new, old)
        phi, opt_state = jax.tree.map(keep, (state.phi, state.opt_state), (phi, opt_state))
        skipped = state.skipped + (~good).astype(jnp.int32)
        return TrainState(phi, opt_state, state.step + 1, state.key, skipped, state.best), loss

    return _Jitted(step)


class _Jitted:
    """A step as a program, which leaves each array of the state where it lay.

    Of results of which nothing is said, XLA decides where on a mesh they lie; where it moves one,
    the next step would be compiled again.
    """

    def __init__(self, step: Step):
        self._step = step
        self._jit = functools.partial(jax.jit, step, donate_argnums=1)
        self._plain, self._staying = self._jit(), {}
        functools.update_wrapper(self, step)

    def __call__(self, params: PyTree, state: TrainState, batch: Any) -> tuple[TrainState, Array]:
        """The next state, and the loss."""
        return self._for(state)(params, state, batch)

    def lower(self, params: PyTree, state: TrainState, batch: Any) -> jax.stages.Lowered:
        """As of what `jax.jit` makes."""
        return self._for(state).lower(params, state, batch)

    def trace(self, params: PyTree, state: TrainState, batch: Any) -> jax.stages.Traced:
        """As of what `jax.jit` makes."""
        return self._for(state).trace(params, state, batch)

    def _for(self, state: TrainState) -> Any:
        leaves, tree = jax.tree.flatten(state)
        if not on_a_mesh(leaves[:1]):  # all lie on the mesh that phi lies on: `start` sees to it
            return self._plain
        where = tuple(leaf.sharding if on_a_mesh([leaf]) else None for leaf in leaves)
        if where not in self._staying:
            self._staying[where] = self._jit(out_shardings=(tree.unflatten(where), None))
        return self._staying[where]


Gradient = Callable[[PyTree, Phi, Any, Array], tuple[Loss, Phi]]
"""`gradient(params, phi, batch, key)` to a total with its count, and the gradient of the total."""


def _gradient(loss_fn: LossFn) -> Gradient:
    def summed(phi: Phi, params: PyTree, batch: Any, key: Array) -> tuple[Array, Array]:
        loss = loss_fn(params, phi, batch, key)
        if isinstance(loss, Loss):
            return loss
        total = scalar(loss)
        return total, jnp.ones((), wide(total.dtype))

    both = jax.value_and_grad(summed, has_aux=True)

    def gradient(params: PyTree, phi: Phi, batch: Any, key: Array) -> tuple[Loss, Phi]:
        (total, count), grads = both(phi, params, batch, key)
        return Loss(total, count), grads

    return gradient


def _accumulated(gradient: Gradient, parts: int) -> Gradient:
    """The sum over the parts of a batch, in float32 or wider."""

    def summed(params: PyTree, phi: Phi, batch: Any, key: Array) -> tuple[Loss, Phi]:
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
            if jnp.shape(leaf)[:1] != (parts,):
                raise ValueError(
                    f'leaves of a batch of {parts} parts must be ({parts}, ...): received '
                    f'{jnp.shape(leaf)} at batch{jax.tree_util.keystr(path)}'
                )

        def body(sums: Any, own: Any) -> tuple[Any, None]:
            index, part = own
            found = gradient(params, phi, part, jax.random.fold_in(key, index))
            return jax.tree.map(lambda s, x: s + x.astype(s.dtype), sums, found), None

        first = jax.tree.map(lambda x: x[0], batch)
        shapes = jax.eval_shape(gradient, params, phi, first, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), shapes)
        return lax.scan(body, zeros, (jnp.arange(parts), batch))[0]

    return summed


def _mean(found: Loss, total: Array, like: Array) -> Array:
    """The gradient of the mean from that of the total."""
    mean = Loss(total.astype(wide(total.dtype)), found.count.astype(wide(total.dtype))).mean
    return mean.astype(like.dtype)


def _finite(tree: Any) -> Array:
    """Whether all is: an optimizer may make something else of a gradient that is."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def _square(tree: Any) -> Array:
    """The sum of all squares, whose overflow is that of an optimizer's second moments."""
    squares = [lax.square(jnp.abs(x.astype(wide(x.dtype)))).sum() for x in jax.tree.leaves(tree)]
    return jnp.stack([square.astype(jnp.float32) for square in squares]).sum()
