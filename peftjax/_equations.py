"""Reads single equations: which move a weight, which use it, and with what geometry.

Only names and parameters of primitives are read here; nothing is evaluated.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from peftjax import _layout, _uses
from peftjax._layout import Labels, Layout
from peftjax._types import Array

KEEPS = frozenset(
    (
        'convert_element_type',
        'copy',
        'copy_p',
        'name',
        'optimization_barrier',
        'pvary',
        'sharding_constraint',
    )
)
"""Primitives with one operand and one result that leave its dimensions alone."""

SCALING = ('mul', 'div')
"""Primitives that scale one operand with the other."""


def layout(
    name: str, params: Any, dims: Labels, shape: Sequence[int], index: Sequence[Array]
) -> Layout | None:
    """The layout operation that a primitive with one result performs on its first operand.

    Args:
      name: of the primitive.
      params: of the equation.
      dims: labels of the operand's dimensions.
      shape: of the operand.
      index: the other operands (where a dynamic slice starts).

    Returns:
      The operation, or `None` if it is not one of layout.
    """
    match name:
        case 'convert_element_type' if not _inexact(params):
            return None
        case _ if name in KEEPS and not index:
            return _layout.same(dims)
        case 'reshard' | 'mesh_cast':
            return _layout.reshard(dims, params['dst_sharding'].spec)
        case 'transpose':
            return _layout.transpose(dims, params['permutation'])
        case 'squeeze':
            return _layout.squeeze(dims, params['dimensions'])
        case 'reshape' if params['dimensions'] is None:
            return _layout.reshape(dims, shape, params['new_sizes'])
        case 'broadcast_in_dim' if not index:
            at = tuple(int(d) for d in params['broadcast_dimensions'])
            return _layout.expand(dims, shape, params['shape'], at)
        case 'slice':
            start, limit = params['start_indices'], params['limit_indices']
            return _layout.window(dims, start, limit, params['strides'])
        case 'dynamic_slice':
            return _layout.dynamic_window(dims, index, params['slice_sizes'])
    return None


def _inexact(params: Any) -> bool:
    """Whether a cast keeps fractions: what is adapted after one that does not, is not the same."""
    return jnp.issubdtype(params['new_dtype'], jnp.inexact)


def split(params: Any, dims: Labels, shape: Sequence[int]) -> list[Layout]:
    """The slices that a `split` cuts."""
    axis, start, cuts = params['axis'], 0, []
    for size in params['sizes']:
        begin = [start if d == axis else 0 for d in range(len(shape))]
        end = [start + int(size) if d == axis else n for d, n in enumerate(shape)]
        cuts.append(_layout.window(dims, begin, end, None))
        start += int(size)
    return cuts


def back_and_forth(
    name: str, params: Any, shape: Sequence[int]
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]] | None:
    """An operation on an output that can be undone: how to undo it, and how to do it again."""
    match name:
        case 'convert_element_type' if _inexact(params):
            return lambda y: y, lambda y: y
        case 'transpose':
            order = params['permutation']
            inverse = sorted(range(len(order)), key=lambda d: order[d])
            return lambda y: y.transpose(inverse), lambda y: y.transpose(order)
        case 'reshape' if params['dimensions'] is None:
            return _reshaped(shape, params['new_sizes'])
        case 'squeeze':
            gone = params['dimensions']
            return _reshaped(shape, [n for d, n in enumerate(shape) if d not in gone])
        case 'broadcast_in_dim' if _inserts_ones(params, shape):
            return _reshaped(shape, params['shape'])
    return None


def _reshaped(
    old: Sequence[int], new: Sequence[int]
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    return lambda y: y.reshape(tuple(old)), lambda y: y.reshape(tuple(new))


def _inserts_ones(params: Any, shape: Sequence[int]) -> bool:
    """Whether a broadcast repeats nothing."""
    kept = params['broadcast_dimensions']
    others = [n for d, n in enumerate(params['shape']) if d not in kept]
    same = [params['shape'][d] for d in kept] == list(shape)
    return same and list(kept) == sorted(kept) and set(others) <= {1}


def multiplier(name: str, values: Sequence[Any], position: int) -> float | None:
    """The number that a primitive of `SCALING` multiplies an operand with.

    Args:
      name: of the primitive.
      values: of its two operands.
      position: of the operand.

    Returns:
      The number; `None` if it is an array, or not known before the function runs.
    """
    other = values[1 - position]
    known = isinstance(other, jax.Array | np.ndarray) and not isinstance(other, Tracer)
    if not known or other.shape or (name, position) == ('div', 1):
        return None
    return 1 / float(other) if name == 'div' else float(other)


def use(
    name: str, params: Any, position: int, operands: Sequence[Any], run: Callable[..., Array]
) -> _uses.Use | None:
    """The geometry of an equation that uses the operand at `position` as its weight.

    Args:
      name: of the primitive.
      params: of the equation.
      position: which operand is the weight.
      operands: all of them, arrays or stand-ins.
      run: the equation: `run(x, w) -> y`.

    Returns:
      The use, or `None` if the equation is not linear in the weight, or in a form that only the
      dense weight serves.
    """
    w = operands[position]
    match name, position:
        case 'dot_general', _:
            return _dot(params, position, w, run)
        case 'gather', 0:
            return _gather(params, operands, run)
        case 'conv_general_dilated', 1:
            return _conv(params, w, run)
        case 'ragged_dot_general', 1:
            return _ragged(params, operands, run)
    return None


def _dot(params: Any, position: int, w: Any, run: Callable[..., Array]) -> _uses.Dot:
    (contract, batch) = params['dimension_numbers']
    mine, other = position, 1 - position
    taken = (*contract[mine], *batch[mine])
    return _uses.Dot(
        run=run,
        kind='expert' if any(w.dims[d] for d in batch[mine]) else 'linear',
        contract=tuple(contract[mine]),
        batch=tuple(batch[mine]),
        free=tuple(d for d in range(len(w.shape)) if d not in taken),
        weight_first=position == 0,
        x_contract=tuple(contract[other]),
        x_batch=tuple(batch[other]),
        precision=params['precision'],
        wide=params['preferred_element_type'],
    )


def _gather(params: Any, operands: Sequence[Any], run: Callable[..., Array]) -> _uses.Gather | None:
    w, x = operands
    numbers, sizes = params['dimension_numbers'], params['slice_sizes']
    rank = len(w.shape)
    batch = tuple(numbers.operand_batching_dims)
    rows = tuple(
        d
        for d in range(rank)
        if d not in batch and (d in numbers.collapsed_slice_dims or sizes[d] != w.shape[d])
    )
    if not rows or any(sizes[d] != 1 for d in rows):
        return None
    free = tuple(d for d in range(rank) if d not in (*rows, *batch))
    sliced = [d for d in range(rank) if d not in (*numbers.collapsed_slice_dims, *batch)]
    offset = dict(zip(sliced, numbers.offset_dims, strict=True))
    around = [d for d in range(len(x.shape) - 1 + len(sliced)) if d not in numbers.offset_dims]
    return _uses.Gather(
        run=run,
        kind='embedding',
        contract=rows,
        batch=batch,
        free=free,
        numbers=numbers,
        mode=params['mode'],
        fill=params['fill_value'],
        offset=tuple(offset[d] for d in free),
        paired=tuple(around[d] for d in numbers.start_indices_batching_dims),
    )


def _conv(params: Any, w: Any, run: Callable[..., Array]) -> _uses.Conv | None:
    numbers = params['dimension_numbers']
    if params['batch_group_count'] != 1:
        return None
    keep = ('window_strides', 'padding', 'lhs_dilation', 'rhs_dilation', 'feature_group_count')
    how = {key: params[key] for key in (*keep, 'dimension_numbers', 'precision')}
    free = (numbers.rhs_spec[0],)
    return _uses.Conv(
        run=run,
        kind='convolution',
        contract=tuple(d for d in range(len(w.shape)) if d not in free),
        batch=(),
        free=free,
        params=how,
        feature=numbers.out_spec[1],
        x_feature=numbers.lhs_spec[1],
        kernel_in=numbers.rhs_spec[1],
        groups=params['feature_group_count'],
    )


def _ragged(params: Any, operands: Sequence[Any], run: Callable[..., Array]) -> _uses.Ragged | None:
    numbers = params['ragged_dot_dimension_numbers']
    contract, batch = numbers.dot_dimension_numbers
    plain = (
        tuple(map(tuple, contract)) == ((1,), (1,))
        and not any(batch)
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and tuple(numbers.rhs_group_dimensions) == (0,)
    )
    if not plain:
        return None
    wide = params['preferred_element_type']
    return _uses.Ragged(run, 'expert', (1,), (0,), (2,), operands[2], params['precision'], wide)
