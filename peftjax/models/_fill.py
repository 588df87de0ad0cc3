"""Fills a model's parameters from a checkpoint: matched both ways, then read part by part."""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import _processes
from peftjax.models._checkpoint import Checkpoint
from peftjax.models._names import Naming, Source, source, stored_names

Shapes = Mapping[str, jax.ShapeDtypeStruct]
ShardingOf = Callable[[str], jax.sharding.Sharding | None]


class Plan(NamedTuple):
    """Which tensors fill which parameters.

    Attributes:
      checkpoint: that holds them.
      sources: of the parameters that are read.
      stored: canonical name -> stored name.
      fresh: paths of the parameters that are drawn.
      unused: stored names of tensors that no parameter needs.
    """

    checkpoint: Checkpoint
    sources: dict[str, Source]
    stored: dict[str, str]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of nested dicts by their paths.

    Args:
      tree: nested dicts.

    Returns:
      `{path: leaf}` in the order of the tree.

    Example:
      >>> by_path({'a': {'b': 1}})
      {'a/b': 1}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator='/'): leaf for p, leaf in leaves}


def match(
    shapes: Shapes,
    checkpoint: Checkpoint,
    naming: Naming,
    *,
    fresh: Callable[[Mapping[str, str]], tuple[str, ...]] = lambda stored: (),
    hint: str = 'config.json and weights must belong to one model.',
) -> Plan:
    """Matches parameters and tensors both ways.

    Args:
      shapes: of the parameters.
      checkpoint: that is to fill them.
      naming: of the family.
      fresh: from the stored names to the paths that are drawn instead.
      hint: the mend, where they do not match.

    Returns:
      The plan.

    Raises:
      ValueError: tensors left over, parameters not filled, shapes that differ, or tensors that
        hold no floats; by name.
    """
    stored = stored_names(checkpoint, naming)
    drawn = fresh(stored)
    read = {path: source(path, naming) for path in shapes if path not in drawn}
    wanted = {name for s in read.values() for name in s.names}
    unfilled = [n for s in read.values() for n in s.names if n not in stored]
    left = [n for n in stored if n not in wanted and n not in naming.twins]
    own = {s.names[0].split('.', 1)[0] for s in read.values()}
    part = lambda name: name.split('.', 1)[0]
    refused = [n for n in left if part(n) not in naming.heads or part(n) in own]
    if unfilled or refused:
        raise ValueError(
            f'cannot load {naming.prefix} from {checkpoint.folder}: every parameter must be filled '
            f'and every tensor used. {len(unfilled)} parameters were not filled{_some(unfilled)}, '
            f'{len(refused)} tensors were not used{_some([stored[n] for n in refused])}. {hint}'
        )
    plan = Plan(checkpoint, read, stored, drawn, tuple(stored[n] for n in left))
    for path, origin in read.items():
        _check_tensors(path, shapes[path].shape, origin, plan)
    for name, twin in naming.twins.items():
        if name in stored and not np.array_equal(
            checkpoint[stored[name]], checkpoint[stored[twin]]
        ):
            raise ValueError(
                f'{stored[name]!r} must equal {stored[twin]!r}, which config.json ties it to; in '
                f'{checkpoint.folder} they differ. Set tie_word_embeddings to false.'
            )
    return plan


def as_stored(shapes: Shapes, plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
    """Parameters in the dtypes of the checkpoint, read from its headers.

    Args:
      shapes: of parameters that are all read.
      plan: from `match`.

    Returns:
      The shapes. A stack has a dtype that holds all of its tensors; float64 is JAX's.
    """
    made = {}
    for path, shape in shapes.items():
        found = {plan.checkpoint.dtype(plan.stored[name]) for name in plan.sources[path].names}
        with jax.numpy_dtype_promotion('standard'):
            made[path] = jax.ShapeDtypeStruct(shape.shape, jnp.result_type(*found))
    return made


def fill(
    shapes: Shapes,
    plan: Plan,
    sharding: ShardingOf | None,
    draw: Callable[[str, jax.ShapeDtypeStruct], jax.Array] | None = None,
) -> dict[str, Any]:
    """Reads parameters one at a time, each device's part of it alone.

    Args:
      shapes: of the parameters; their dtypes are what tensors are cast to.
      plan: from `match`.
      sharding: from a path to where the parameter lives; None is the default device.
      draw: makes a fresh parameter.

    Returns:
      Nested dicts of arrays.

    Raises:
      ValueError: a number that the dtype does not hold, by the tensor's name.
    """
    params: dict[str, Any] = {}
    for path, shape in shapes.items():
        where = sharding(path) if sharding else None
        if path in plan.fresh:
            assert draw is not None
            value = draw(path, shape)
            value = value if where is None else _processes.put(value, where)
        else:
            value = _place(plan, path, shape, where)
        insert(params, path, value)
    return params


def _place(
    plan: Plan, path: str, shape: jax.ShapeDtypeStruct, where: jax.sharding.Sharding | None
) -> jax.Array:
    """A parameter where it is to live."""
    origin = plan.sources[path]
    if where is None:
        whole = tuple(slice(0, size) for size in shape.shape)
        return jax.device_put(_read(plan, origin, whole, shape.dtype), may_alias=True)
    parts: dict[Any, np.ndarray] = {}
    arrays = []
    for device, index in where.addressable_devices_indices_map(shape.shape).items():
        bounds = tuple(i.indices(n)[:2] for i, n in zip(index or (), shape.shape, strict=True))
        if bounds not in parts:
            parts[bounds] = _read(plan, origin, tuple(slice(*b) for b in bounds), shape.dtype)
        arrays.append(jax.device_put(parts[bounds], device, may_alias=True))
    return jax.make_array_from_single_device_arrays(shape.shape, where, arrays)


def part(plan: Plan, path: str, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    """A rectangle of a parameter, of which alone is read.

    Args:
      plan: from `match`.
      path: of the parameter.
      index: of step one, for each axis.
      dtype: that it is cast to.

    Returns:
      The rectangle.

    Raises:
      ValueError: a number that the dtype does not hold, by the tensor's name.
    """
    return _read(plan, plan.sources[path], index, dtype)


def _read(plan: Plan, origin: Source, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    """A rectangle of a parameter, tensor by tensor."""
    value = aligned(tuple(i.stop - i.start for i in index), np.dtype(dtype))
    depth = len(origin.stack)
    names = np.array(origin.names, object).reshape(origin.stack)
    inner = index[depth:][::-1] if origin.transposed else index[depth:]
    for at in itertools.product(*(range(i.start, i.stop) for i in index[:depth])):
        tensor = plan.checkpoint.part(plan.stored[names[at]], inner)
        slot = value[tuple(a - i.start for a, i in zip(at, index, strict=False))]
        _cast(plan.stored[names[at]], tensor.T if origin.transposed else tensor, slot)
    return value


def _cast(name: str, tensor: np.ndarray, slot: np.ndarray) -> None:
    """Copies a tensor to where it belongs; refuses what becomes infinite there."""
    with np.errstate(over='ignore'):  # is said below, with the name
        np.copyto(slot, tensor, casting='unsafe')
    if jnp.finfo(slot.dtype).max >= jnp.finfo(tensor.dtype).max or np.isfinite(slot).all():
        return
    lost = tensor[np.isfinite(tensor) & ~np.isfinite(slot)]
    if lost.size:
        raise ValueError(
            f'{name!r} must fit into {slot.dtype.name}: {lost.size} of its numbers, such as '
            f'{float(lost[0]):g}, become infinite. Load with a wider dtype.'
        )


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that starts on a cache line: a CPU device takes it over without a copy.

    Args:
      shape: of the array.
      dtype: of the array.

    Returns:
      The array, with whatever stood there.
    """
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _some(names: list[str]) -> str:
    return f' ({", ".join(names[:5])}{", …" if len(names) > 5 else ""})' if names else ''


def _check_tensors(path: str, shape: tuple[int, ...], origin: Source, plan: Plan) -> None:
    """Compares shapes and kinds of numbers, by the headers."""
    expected = shape[len(origin.stack) :]
    expected = expected[::-1] if origin.transposed else expected
    for name in origin.names:
        plan.checkpoint.dtype(plan.stored[name])  # refuses codes
        received = plan.checkpoint.shape(plan.stored[name])
        if received != expected:
            raise ValueError(
                f'{path} needs {plan.stored[name]!r} of shape {expected}, the checkpoint has '
                f'{received}. config.json and weights must agree; a classifier of another width '
                'is drawn when key=... is given.'
            )


def insert(tree: dict[str, Any], path: str, value: Any) -> None:
    """Puts a leaf into nested dicts.

    Args:
      tree: to change.
      path: of the leaf.
      value: the leaf.
    """
    *parents, leaf = path.split('/')
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = value
