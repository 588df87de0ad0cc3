"""One call of an apply function, flat: arrays in, arrays out, all else kept aside."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from peftjax import _paths
from peftjax._quantized import dequantize
from peftjax._types import ApplyFn, Array, PyTree


class Call:
    """One call of an apply function, flat: leaves by path, arrays in, arrays out."""

    def __init__(self, fn: ApplyFn, params: PyTree, args: Sequence[Any], kwargs: Mapping[str, Any]):
        self.leaves = _paths.leaves(params)
        self.inputs, self._fill = split((tuple(args), dict(kwargs)))
        self._fn, self._tree = fn, _paths.structure(params)
        self.out: Any = None

    def flat(self, *arrays: Array) -> list[Any]:
        """The function on flat arrays; leaves the structure of the result in `out`."""
        count = len(self.leaves)
        params = jax.tree.unflatten(self._tree, arrays[:count])
        args, kwargs = self._fill(arrays[count:])
        outs, self.out = jax.tree.flatten(self._fn(params, *args, **kwargs))
        return outs


def takes(fn: ApplyFn, keyword: str) -> bool:
    """Whether a function names a keyword that is still open."""
    try:
        named = inspect.signature(fn).parameters
    except (TypeError, ValueError):  # what is not written in Python may have no signature
        return False
    closed = fn.keywords if isinstance(fn, functools.partial) else {}
    return keyword in named and keyword not in closed


def is_array(leaf: Any) -> bool:
    """Whether a leaf counts as an array; all else is static."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def split(tree: PyTree) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays of a tree, and how to put others in their places; all else stays as it is."""
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

    def fill(arrays: Sequence[Any]) -> Any:
        full = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            full[place] = array
        return jax.tree.unflatten(structure, full)

    return [leaves[i] for i in places], fill


def result_shapes(fn: ApplyFn, params: PyTree, args: Any, kwargs: Any) -> PyTree:
    """Shapes of the result of a call."""
    arrays, fill = split((tuple(args), dict(kwargs)))

    def run(params: PyTree, arrays: Sequence[Any]) -> PyTree:
        args, kwargs = fill(arrays)
        return fn(dequantize(params), *args, **kwargs)

    return jax.eval_shape(run, params, arrays)
