"""A training state as flat arrays that a file can hold, and back."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax._types import Path, PyTree

Spec = list[Any]
"""`[shape, dtype]`, as JSON keeps it; of a key its own, of what is stored the bits."""


def specs(state: PyTree) -> dict[Path, Spec]:
    """Shape and dtype of every array, by path.

    Raises:
      TypeError: a leaf is no array.
      ValueError: two leaves share one path.
    """
    found: dict[Path, Spec] = {}
    for path, leaf in _leaves(state):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
            raise TypeError(f'a state must be made of arrays; {path!r} is {leaf!r:.80}')
        found[path] = [list(leaf.shape), str(_dtype(leaf))]
    return found


def held(state: PyTree) -> dict[Path, Any]:
    """Copies of the arrays that have values, which stay as they are when the state is donated."""
    return {path: _copy(_bits(leaf)) for path, leaf in _leaves(state) if _filled(leaf)}


def targets(like: PyTree) -> dict[Path, jax.ShapeDtypeStruct]:
    """What is to be read for a state like this one, each array to where its like lives."""
    return {path: _target(leaf) for path, leaf in _leaves(like) if _filled(leaf)}


def rebuilt(like: PyTree, arrays: Mapping[Path, Any]) -> PyTree:
    """A state like this one with the arrays read; those without values are made anew."""

    def leaf(path: Path, old: Any) -> Any:
        if not _filled(old):
            return jnp.zeros(old.shape, _dtype(old))
        new = arrays[path] if _is_bound(old) else jnp.array(np.asarray(arrays[path]))
        return jax.random.wrap_key_data(new, impl=jax.random.key_impl(old)) if _is_key(old) else new

    _, tree = jax.tree.flatten(like)
    return jax.tree.unflatten(tree, [leaf(path, old) for path, old in _leaves(like)])


def _leaves(state: PyTree) -> list[tuple[Path, Any]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    paths = [jax.tree_util.keystr(keys, simple=True, separator='/') for keys, _ in flat]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(
            f'each array of a state needs a path of its own; {twice!r} names two. Rename a key'
        )
    return [(path, leaf) for path, (_, leaf) in zip(paths, flat, strict=True)]


def _dtype(leaf: Any) -> Any:
    """The dtype that an array has in a step: JAX has neither all of NumPy's nor all its orders."""
    if not isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype
    return jax.dtypes.canonicalize_dtype(leaf.dtype.newbyteorder('='))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_bound(leaf: Any) -> bool:
    """Whether an array belongs to its devices, or goes along to those of theta.

    One that was read belongs to them: beside theta on a mesh it would be refused, and elsewhere
    the step would be compiled once more.
    """
    return getattr(leaf, 'committed', getattr(leaf, 'sharding', None) is not None)


def _filled(leaf: Any) -> bool:
    """Orbax stores no array without values."""
    return math.prod(leaf.shape) > 0


def _bits(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _copy(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf  # with several processes a state is written before it is donated
    return np.array(leaf, _dtype(leaf))  # a CPU's buffer would be written over by the next step


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    bits = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    sharding = getattr(leaf, 'sharding', None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(bits.shape, _dtype(bits), sharding=sharding)
