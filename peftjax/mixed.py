"""Mixed batches: each row with a phi of its own, all in one program."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peftjax._method import typed_key
from peftjax._peft import Peft
from peftjax._types import ApplyFn, Array, Phi, PyTree
from peftjax.many import size

Axes = Any
"""As of `jax.vmap`: a number, None, or a tree of them over the leaves of an argument."""


class Rows(NamedTuple):
    """The phi of a mixed batch.

    Attributes:
      phis: a stack, as from `pj.stack`; for rows that have none, `pj.base_phi` is one of it.
      index: int `(rows,)`, the place of each row's phi in the stack. A place that is not there
        gives NaN.
    """

    phis: Phi
    index: Array


def mixed(
    peft: Peft,
    fn: ApplyFn,
    *,
    in_axes: Axes = 0,
    out_axes: Axes = 0,
    keywords: Mapping[str, Axes] | None = None,
) -> 'MixedForward':
    """Turns `fn(params, *args, **kwargs)` into a forward whose rows have a phi each.

    Theta meets all rows in one product, as without phi; each phi meets its own rows. Which row has
    which phi is data: another index, or other phi in a stack of the same size, compiles nothing.
    Gradients reach every phi from its own rows.

    Not for models whose tokens are sorted by experts, as `models.Decoder` does with those of a
    mixture: JAX has no `vmap` of `lax.ragged_dot`.

    Each row is computed alone: of what looks across rows (norms of a batch, losses that compare
    rows) it makes that of one row. A loss must give a number for each row.

    Args:
      peft: as from `attach`, of any method.
      fn: the apply function, or any other that uses the same parameters.
      in_axes: where the rows are in the positional arguments after `params`: one for all, or a
        tuple with one for each; None is for what all rows share. As of `jax.vmap`, trees reach the
        leaves of an argument. What is no array is static and has none.
      out_axes: where they are in the results; None is for a result that no row changes.
      keywords: likewise for arguments by name; those not named have their rows first.

    Returns:
      `forward(params, Rows(phis, index), *args, dropout_key=None, **kwargs)`, pure, not yet jitted.
      As of `Peft.wrap`, it has `peft` and `continued`, so that `pj.generate` takes it.

    Raises (when traced):
      ValueError: an argument has not as many rows as the index, a result has none, or `keywords`
        names what the call does not have.
      TypeError: it is not given `Rows`, or their index is not one of integers.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params, x = {'kernel': jnp.ones((3, 4))}, jnp.ones((3, 3))
      >>> model = lambda params, x: x @ params['kernel']
      >>> peft = pj.attach(pj.Ia3(target='kernel'), model, params, x)
      >>> base = pj.base_phi(peft, params)
      >>> phis = pj.stack([base, jax.tree.map(lambda l: 2 * l, base)])
      >>> forward = jax.jit(pj.mixed(peft, model))
      >>> forward(params, pj.Rows(phis, jnp.array([0, 1, 0])), x)[:, 0].tolist()
      [3.0, 6.0, 3.0]

    Reference: S-LoRA (Sheng et al. 2023, arXiv:2311.03285) and Punica (Chen et al. 2023,
    arXiv:2310.18547) serve rows of different LoRA over one base so.
    """
    return MixedForward(peft, fn, in_axes, out_axes, tuple((keywords or {}).items()))


@dataclasses.dataclass(frozen=True)
class MixedForward:
    """`forward(params, rows, *args, dropout_key=None, **kwargs)`, as `mixed` makes it.

    Attributes:
      peft: the plan.
      fn: the function that it wraps.
      in_axes: where the rows of positional arguments are.
      out_axes: where those of results are.
      keywords: where those of arguments by name are.
      begins: whether the tokens of a call are the first of their sequences.
    """

    peft: Peft
    fn: ApplyFn
    in_axes: Axes = 0
    out_axes: Axes = 0
    keywords: tuple[tuple[str, Axes], ...] = ()
    begins: bool = True

    def __hash__(self) -> int:
        """Of what always has one: trees of axes may be dicts and lists."""
        return hash((self.peft, self.fn, self.begins))

    @property
    def continued(self) -> 'MixedForward':
        """The same for tokens that follow others: virtual tokens were read before them."""
        return dataclasses.replace(self, begins=False)

    def __call__(
        self,
        params: PyTree,
        rows: Rows,
        *args: Any,
        dropout_key: Array | None = None,
        **kwargs: Any,
    ) -> PyTree:
        """The wrapped function, each row with its phi."""
        phis, index = _checked(rows)
        own, count = _gathered(phis, index), index.shape[0]
        leaves, structure = jax.tree.flatten((args, kwargs))
        axes = self._axes(args, kwargs, count)
        places = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
        keys = None if dropout_key is None else jax.random.split(typed_key(dropout_key), count)

        def row(own: Phi, key: Array | None, arrays: list[Array]) -> PyTree:
            filled = list(leaves)
            for i, array in zip(places, arrays, strict=True):
                filled[i] = _alone(array, axes[i])
            args, kwargs = jax.tree.unflatten(structure, filled)
            forward = self.peft.wrap(self.fn)
            forward = forward if self.begins else forward.continued
            return self._one(forward(params, own, *args, dropout_key=key, **kwargs))

        over = (0, None if keys is None else 0, [axes[i] for i in places])
        arrays = [leaves[i] for i in places]
        return jax.vmap(row, in_axes=over, out_axes=self.out_axes)(own, keys, arrays)

    def _axes(self, args: Any, kwargs: Mapping[str, Any], count: int) -> list[int | None]:
        """The axis of rows for each leaf of the arguments, checked; those by name sorted."""
        named, each = dict(self.keywords), self.in_axes
        if unknown := sorted(set(named) - set(kwargs)):
            raise ValueError(
                f'keywords must name arguments of the call; it has no {unknown[0]!r}, but '
                f'{", ".join(sorted(kwargs)) or "none by name"}. Correct the name, or leave it out'
            )
        each = each if isinstance(each, tuple) else (each,) * len(args)
        if len(each) != len(args):
            raise ValueError(
                f'in_axes must say something of each argument after params; got {len(each)} for '
                f'{len(args)}'
            )
        positional = zip(each, args, strict=True)
        own = [_spread(axis, arg, f'argument {i}') for i, (axis, arg) in enumerate(positional)]
        own += [_spread(named.get(n, 0), kwargs[n], n) for n in sorted(kwargs)]
        found = []
        for axis, leaf, what in (one for mine in own for one in mine):
            axis = axis if _is_array(leaf) else None
            found.append(axis)
            if axis is not None and _rows(leaf, axis) != count:
                raise ValueError(
                    f'each of {count} rows needs its part of every argument; {what} has shape '
                    f'{jnp.shape(leaf)}, and axis {axis} is to be that of rows. Say where they '
                    'are in in_axes or keywords, None for what all rows share'
                )
        return found

    def _one(self, out: PyTree) -> PyTree:
        """The results of one row, without the axis of rows."""

        def cut(axis: int | None, leaf: Any, what: str) -> Any:
            if axis is None:
                return leaf
            if _rows(leaf, axis) != 1:
                raise ValueError(
                    f'of one row there must be one result; {what} has shape {jnp.shape(leaf)}, and '
                    f'axis {axis} is to be that of rows. Say where they are in out_axes, or give '
                    'a result for each row where there is a sum or mean over all'
                )
            return jnp.squeeze(leaf, axis)

        found = [cut(*one) for one in _spread(self.out_axes, out, 'result')]
        return jax.tree.unflatten(jax.tree.structure(out), found)


def _checked(rows: Rows) -> Rows:
    if not isinstance(rows, Rows):
        raise TypeError(
            'a mixed forward takes pj.Rows(phis, index), a stack of phi and the place of each '
            f"row's; got {type(rows).__name__}"
        )
    index = rows.index
    if not _is_array(index) or index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
        own = f'{index.dtype} of shape {index.shape}' if _is_array(index) else type(index).__name__
        raise TypeError(f'the index of a mixed batch is an array of int, (rows,); got {own}')
    return rows


def _gathered(phis: Phi, index: Array) -> Phi:
    """The phi of each row; NaN where there is none, negative places among them."""
    if index.dtype.itemsize <= 4:
        index = index.astype(jnp.int32)  # a narrow one could not count the stack
    own = np if isinstance(index, np.ndarray) else jnp  # JAX may cut a wide one of NumPy
    nowhere = (index < 0) | (index >= size(phis))
    known = own.where(nowhere, size(phis), index).astype(np.int32)
    take = lambda leaf: leaf.at[known].get(mode='fill', fill_value=jnp.nan)
    return jax.tree.map(take, phis)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _alone(row: Array, axis: int | None) -> Array:
    """A row as a batch of one."""
    return row if axis is None else jnp.expand_dims(row, axis)


def _rows(leaf: Any, axis: int) -> int | None:
    """How many there are along an axis, if there is one."""
    shape: tuple[int, ...] = jnp.shape(leaf)
    return shape[axis] if -len(shape) <= axis < len(shape) else None


def _spread(axes: Axes, tree: PyTree, what: str) -> list[tuple[int | None, Any, str]]:
    """Each leaf of a tree with its axis and its name.

    Raises:
      ValueError: the axes are no prefix of the tree.
    """
    each = lambda axis, part: [_Axis(axis)] * len(jax.tree.leaves(part))
    try:
        found = jax.tree.map(each, axes, tree, is_leaf=lambda node: node is None)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f'where rows are is said by a number, None, or a tree over {what}; got {axes!r}: '
            f'{error}'
        ) from error
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [
        (axis.number, leaf, what + jax.tree_util.keystr(keys))
        for axis, (keys, leaf) in zip(jax.tree.leaves(found), flat, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class _Axis:
    """An axis as a leaf, which None is not."""

    number: int | None
