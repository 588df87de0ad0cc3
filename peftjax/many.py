"""Many phi on one theta: stacked along a first axis, to be trained or run by `jax.vmap`.

A stack is a tree like each of its members, every array with a first axis more. So K trainings are
one program, with theta held once:

    many = jax.jit(jax.vmap(step, in_axes=(None, 0, 0)), donate_argnums=1)
    states, losses = many(params, states, batches)

where `step` is any `pj.train_step` and `states` a stack of `pj.start(...)`: K seeds, K tasks (a
batch each, or one for all with `in_axes=(None, 0, None)`), K learning rates
(`optax.inject_hyperparams` keeps a rate in the state), K ranks (`pj.pad_ranks`). Models with
`lax.ragged_dot`, as mixtures of experts have it, do not: JAX has no `vmap` of it. The loop is your
own: `pj.fit` and `pj.Checkpoints` take one state. `pj.mixed` runs a batch whose rows have a phi
each.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from peftjax import _paths
from peftjax._counts import whole
from peftjax._peft import Peft
from peftjax._types import Array, Path, Phi, PyTree


def stack(trees: Sequence[PyTree], *, room: int | None = None) -> PyTree:
    """Phi, or states of training, or any trees of arrays, as one with a first axis more.

    Phi says nothing of its method: adapters of one shape and different scales stack, and one plan
    then serves them wrongly. `pj.pad_ranks` knows the plans.

    Args:
      trees: of the same paths, shapes and dtypes.
      room: how many places there are in all; those left over hold NaN, so that using one shows,
        and `swap` fills them. For inference: a step does not update what is not finite.

    Returns:
      The same tree of arrays `(len(trees), ...)`, or `(room, ...)`.

    Raises:
      ValueError: there are no trees, their paths, shapes or dtypes differ, or there is too little
        room.
      TypeError: there is one tree and no list of them, or `room` is no integer.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> phis = [{'kernel': {'a': jnp.full((3, 2), i)}} for i in (0.0, 1.0)]
      >>> pj.stack(phis)['kernel']['a'].shape
      (2, 3, 2)
      >>> pj.stack(phis, room=4)['kernel']['a'][:, 0, 0]
      Array([ 0.,  1., nan, nan], dtype=float32)
    """
    if isinstance(trees, Mapping) or hasattr(trees, '_fields'):  # a state is a tuple too
        raise TypeError(f'a stack is made of a list of trees; got one {type(trees).__name__}')
    if not (trees := list(trees)):
        raise ValueError('a stack needs a tree at least; got none')
    spare = 0 if room is None else whole('room', room) - len(trees)
    if spare < 0:
        raise ValueError(f'{len(trees)} trees need room for as many; got room={room}')
    kinds = [_kinds(tree) for tree in trees]
    for number, other in enumerate(kinds):
        _check_alike(f'tree {number} of a stack', kinds[0], other)
        made = [jax.tree.structure(trees[i]) for i in (0, number)]
        if made[0] != made[1]:
            raise ValueError(
                f'tree {number} of a stack must be made of the containers of the first: '
                f'{made[1]}, not {made[0]}'
            )
    return jax.tree.map(functools.partial(_stacked, spare), *trees)


def unstack(tree: PyTree) -> list[PyTree]:
    """The members of a stack.

    Args:
      tree: of arrays with a common first axis, as from `stack` or from what `jax.vmap` made of one.

    Returns:
      One tree for each place.

    Raises:
      ValueError: the first axes differ, or there is none.

    Example:
      >>> import jax.numpy as jnp, peftjax as pj
      >>> [one['a'].tolist() for one in pj.unstack({'a': jnp.arange(4).reshape(2, 2)})]
      [[0, 1], [2, 3]]
    """
    at = lambda i: jax.tree.map(lambda leaf: leaf[i], tree)
    return [at(i) for i in range(size(tree))]


def swap(stacked: PyTree, index: int | Array, tree: PyTree) -> PyTree:
    """A stack with another member at one place; compiled once for all places.

    Args:
      stacked: as from `stack`; it is donated: use the new one.
      index: the place, an integer from 0. Under `jax.jit`, which cannot know it, another place
        leaves the stack as it is.
      tree: of the shapes and dtypes of a member.

    Returns:
      The new stack.

    Raises:
      ValueError: paths, shapes or dtypes differ, or there is no such place.
      TypeError: the place is no integer.

    Example:
      >>> import jax.numpy as jnp, peftjax as pj
      >>> phis = pj.stack([{'a': jnp.zeros(2)}], room=2)
      >>> pj.swap(phis, 1, {'a': jnp.ones(2)})['a'].tolist()
      [[0.0, 0.0], [1.0, 1.0]]
    """
    count = size(stacked)
    members = {path: (shape[1:], dtype) for path, (shape, dtype) in _kinds(stacked).items()}
    _check_alike('a member of this stack', members, _kinds(tree))
    if isinstance(index, Tracer):
        if index.shape or not jnp.issubdtype(index.dtype, jnp.integer):
            raise TypeError(
                f'a place must be an integer: received {index.dtype} of shape {index.shape}'
            )
    else:
        index = whole('a place', index, 0)
        if index >= count:
            raise ValueError(f'a stack of {count} has places 0 to {count - 1}; got {index}')
    return _swap(stacked, jnp.asarray(index, jnp.int32), tree)


@functools.partial(jax.jit, donate_argnums=0)
def _swap(stacked: PyTree, index: Array, tree: PyTree) -> PyTree:
    known = jnp.where(index < 0, size(stacked), index)  # from the end counts nobody here
    return jax.tree.map(lambda all_, own: all_.at[known].set(own, mode='drop'), stacked, tree)


def base_phi(peft: Peft, params: PyTree) -> Phi:
    """A phi with which the model is the base: what rows of a mixed batch get that have none.

    Args:
      peft: as from `attach`.
      params: the model's parameters.

    Returns:
      A fresh phi: of it the base does not depend on what is drawn.

    Raises:
      ValueError: a method does not start at the base.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params, x = {'kernel': jnp.ones((3, 4))}, jnp.ones((2, 3))
      >>> model = lambda params, x: x @ params['kernel']
      >>> peft = pj.attach(pj.Ia3(target='kernel'), model, params, x)
      >>> pj.base_phi(peft, params)['kernel']['l'].tolist()
      [1.0, 1.0, 1.0, 1.0]
    """
    for keys, part in peft.method.parts:
        if part.identity == 'no':
            name = f'{type(part).__name__} ({"/".join(keys)})' if keys else type(part).__name__
            raise ValueError(
                f'{name} does not start at the base: no phi of it leaves the model as it is. Run '
                'rows without it through the base itself'
            )
    return peft.init(jax.random.key(0), params)


def size(stacked: PyTree) -> int:
    """How many members a stack has.

    Raises:
      ValueError: its arrays do not say so alike.
    """
    counts: dict[int | None, Path] = {}
    for path, (shape, _) in _kinds(stacked).items():
        counts.setdefault(shape[0] if shape else None, path)
    first = next(iter(counts), None)
    if len(counts) > 1 or first is None:
        said = ', '.join(f'{count} at {path!r}' for count, path in counts.items())
        raise ValueError(
            f'the arrays of a stack have one first axis in common; got {said or "no arrays"}. Make '
            'it by pj.stack'
        )
    return first


Kind = tuple[tuple[int, ...], str]


def _kinds(tree: PyTree) -> dict[Path, Kind]:
    """Shape and dtype of each array."""
    found = _paths.leaves(tree).items()
    return {path: (jnp.shape(leaf), str(jnp.result_type(leaf))) for path, leaf in found}


def _check_alike(what: str, want: Mapping[Path, Kind], have: Mapping[Path, Kind]) -> None:
    wrong = [f'{path!r} is missing' for path in want if path not in have]
    wrong += [f'{path!r} is unknown' for path in have if path not in want]
    wrong += [
        f'{path!r} is {_said(have[path])}, not {_said(want[path])}'
        for path in want
        if path in have and have[path] != want[path]
    ]
    if wrong:
        more = f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''
        raise ValueError(
            f'{what} must have the paths, shapes and dtypes of the first: {"; ".join(wrong[:5])}'
            f'{more}. Of other ranks: pj.pad_ranks; of other methods: a stack for each'
        )


def _said(kind: Kind) -> str:
    shape, dtype = kind
    return f'{dtype}[{",".join(map(str, shape))}]'


def _stacked(spare: int, *leaves: Any) -> Array:
    found = jnp.stack(leaves)
    if not spare:
        return found
    if not jnp.issubdtype(found.dtype, jnp.inexact):
        raise ValueError(f'room is for arrays of floats, which can hold NaN; got {found.dtype}')
    return jnp.concatenate([found, jnp.full((spare, *found.shape[1:]), jnp.nan, found.dtype)])
