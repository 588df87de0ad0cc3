"""A sum over parts of the data whose derivative is found together with its value."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from peftjax._types import Array, PyTree


def recompute(*_: Any, **__: Any) -> bool:
    """The policy of a part: nothing of it is kept.

    A loop over parts under this very policy is one of `sum_in_one_pass`, whose derivative is that
    of the parts: whoever evaluates a jaxpr may rebuild it as such.
    """
    return False


def sum_in_one_pass(fn: Callable[[PyTree, PyTree], Array], shared: PyTree, parts: PyTree) -> Array:
    """`sum(fn(shared, part) for part in parts)`, with the derivative found in the same pass.

    The sum is a scalar, so its derivative is known up to a factor when the sum is. One loop finds
    both, part by part, and keeps nothing else of a part. It asks JAX for which arrays a derivative
    is wanted: those alone are differentiated by. Reverse mode only, of any order.

    Args:
      fn: `fn(shared, part)`, a float scalar. It closes over no array that is differentiated by.
      shared: pytree of arrays.
      parts: pytree of arrays, `(parts, ...)`.

    Returns:
      A scalar.

    Example:
      >>> fn = lambda w, x: (x @ w).sum()
      >>> w, x = jnp.ones(3), jnp.arange(6.0).reshape(2, 1, 3)
      >>> sum_in_one_pass(fn, w, x), jax.grad(sum_in_one_pass, argnums=1)(fn, w, x)
      (Array(15., dtype=float32), Array([3., 5., 7.], dtype=float32))
    """
    whole, tree = jax.tree.flatten(shared)
    sliced, part_tree = jax.tree.flatten(parts)

    def part(whole: Sequence[Array], sliced: Sequence[Array]) -> Array:
        return fn(jax.tree.unflatten(tree, whole), jax.tree.unflatten(part_tree, sliced))

    @jax.custom_vjp
    def total(whole: Sequence[Array], sliced: Sequence[Array]) -> Array:
        again = jax.checkpoint(part, prevent_cse=False, policy=recompute)
        return lax.scan(lambda _, x: (None, again(whole, x)), None, sliced)[1].sum()

    dtypes = [[leaf.dtype for leaf in leaves] for leaves in (whole, sliced)]
    total.defvjp(partial(_both, part), partial(_scaled, dtypes), symbolic_zeros=True)
    return total(whole, sliced)


def _both(part: Callable[..., Array], whole: Any, sliced: Any) -> tuple[Array, Any]:
    """The sum and, for each array that is differentiated by, its derivative, else `None`."""
    asked = [[_asked(leaf) for leaf in leaves] for leaves in (whole, sliced)]
    whole, sliced = ([leaf.value for leaf in leaves] for leaves in (whole, sliced))

    def body(sums: Sequence[Array], x: Sequence[Array]) -> tuple[Any, Any]:
        run = lambda own: part(*map(_filled, own, (whole, x), asked))
        value, (of_whole, of_x) = jax.value_and_grad(run)(list(map(_chosen, (whole, x), asked)))
        return [s + d.astype(s.dtype) for s, d in zip(sums, of_whole, strict=True)], (value, of_x)

    sums = [jnp.zeros_like(w, wide(w.dtype)) for w in _chosen(whole, asked[0])]
    # differentiated once more, a part is computed again: its inside is never kept
    again = jax.checkpoint(body, prevent_cse=False, policy=recompute)
    sums, (values, of_sliced) = lax.scan(again, sums, sliced)
    nothing = [[None] * len(leaves) for leaves in asked]
    return values.sum(), list(map(_filled, (sums, of_sliced), nothing, asked))


def _scaled(dtypes: Any, found: Any, by: Array) -> Any:
    def scaled(array: Array | None, dtype: Any) -> Array | None:
        if array is None:
            return None
        return (array.astype(wide(dtype)) * by.astype(wide(dtype))).astype(dtype)

    return tuple(list(map(scaled, *pair)) for pair in zip(found, dtypes, strict=True))


def _asked(leaf: Any) -> bool:
    return leaf.perturbed and jnp.issubdtype(leaf.value.dtype, jnp.inexact)


def wide(dtype: Any) -> Any:
    """The dtype of a sum of many terms: float32, or the dtype itself if it is as wide."""
    return jnp.dtype(dtype) if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype('float32')


def _chosen(leaves: Sequence[Any], asked: Sequence[bool]) -> list[Any]:
    return [leaf for leaf, a in zip(leaves, asked, strict=True) if a]


def _filled(own: Sequence[Any], leaves: Sequence[Any], asked: Sequence[bool]) -> list[Any]:
    """`leaves`, with those that are asked for replaced by `own`, in order."""
    rest = iter(own)
    return [next(rest) if a else leaf for leaf, a in zip(leaves, asked, strict=True)]
