"""Where a function uses its parameters: found by tracing it with abstract values."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from peftjax import _paths, _virtual
from peftjax._call import Call, is_array, split
from peftjax._interpret import evaluate
from peftjax._quantized import dequantize, is_quantized
from peftjax._record import Recorder, distinct, outputs
from peftjax._run import Run
from peftjax._sites import Site, Sites
from peftjax._standin import bare
from peftjax._types import ApplyFn, Array, PyTree


def sites(apply_fn: ApplyFn, params: PyTree, /, *args: Any, **kwargs: Any) -> Sites:
    """Finds where and how an apply function uses its parameters.

    The function is traced with abstract values: nothing is computed.

    Args:
      apply_fn: `apply_fn(params, *args, **kwargs)`, any pure function.
      params: pytree of arrays or `jax.ShapeDtypeStruct`s, or of leaves quantized by `pj.quantize`.
      *args: as for a call; arrays may be `jax.ShapeDtypeStruct`s, all else is static.
      **kwargs: likewise.

    Returns:
      The site table: iterable, and readable when printed.

    Raises:
      TypeError: a leaf of `params` is not an array.

    Example:
      >>> import jax.numpy as jnp, peftjax as pj
      >>> params = {'up': {'kernel': jnp.ones((3, 4)), 'bias': jnp.zeros(4)}}
      >>> def mlp(params, x):
      ...     return x @ params['up']['kernel'] + params['up']['bias']
      >>> print(pj.sites(mlp, params, jnp.ones((2, 3))))
      path       kind    shape  axes          bias     path taken
      up/bias    bias    4                             efficient
      up/kernel  linear  3×4    in[0] out[1]  up/bias  efficient
    """
    recorder = _recorded(apply_fn, params, args, kwargs)
    found = distinct(recorder)
    used = {site.path for site in found}
    return Sites(found, tuple(path for path in recorder.leaves if path not in used))


def _recorded(apply_fn: ApplyFn, params: PyTree, args: Any, kwargs: Any) -> Recorder:
    """All uses of all leaves."""

    def record(params: PyTree, arrays: Sequence[Array]) -> None:
        call = Call(apply_fn, dequantize(params), *fill(arrays))
        views = [bare(path, w, recorder) for path, w in call.leaves.items()]
        evaluate(call.flat, views, call.inputs, Run({}, {}, recorder))

    leaves = _paths.leaves(_checked(params))
    recorder = Recorder(
        {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    )
    arrays, fill = split((args, kwargs))
    jax.eval_shape(record, params, arrays)
    return recorder


def grown(
    base: Sites, room: _virtual.Virtual, apply_fn: ApplyFn, params: PyTree, args: Any, kwargs: Any
) -> Sites:
    """The sites with virtual tokens in place, knowing along which dimension tokens lie."""
    arrays, fill = split((args, kwargs))
    refill: list[Callable[[Sequence[Any]], Any]] = []

    def stretch(arrays: Sequence[Any]) -> Sequence[Any]:
        longer, again = split(room.extend(*fill(arrays)))
        refill.append(again)
        return longer

    longer = jax.eval_shape(stretch, arrays)
    short, args, kwargs = (args, kwargs), *refill[-1](longer)
    try:
        recorder = _recorded(apply_fn, params, args, kwargs)
    except Exception as error:
        shapes = {
            path: leaf.shape
            for path, leaf in _paths.leaves([args, kwargs]).items()
            if is_array(leaf)
        }
        raise ValueError(
            f'with {room.length} virtual tokens the function cannot be traced. Perhaps an argument '
            f'sized by the tokens was not lengthened with them (fill=…), or a size is fixed inside '
            f'the function. Shapes now: {shapes}. It says: {str(error).partition(chr(10))[0]:.300}'
        ) from error
    uses = outputs(recorder)
    again = any(len(shapes) > 1 for shapes in uses.values())
    earlier = outputs(_recorded(apply_fn, params, *short)) if again else {}
    found = []
    for before, after in zip(base, distinct(recorder), strict=True):
        shapes = earlier.get(after.use, [before.output])
        found.append(_with_tokens(before, after, shapes, uses[after.use], room.length))
    return Sites(tuple(found), base.unused)


def _with_tokens(
    before: Site, after: Site, shapes: Sequence[Any], longer: Sequence[Any], by: int
) -> Site:
    """A site and where its tokens are, if all of its outputs have become longer by their number."""
    axes = _virtual.grown(before.output, after.output, by)
    for shape in longer:
        if not any(_virtual.grown(old, shape, by) for old in shapes):
            # a use without virtual tokens would have rows of its own overwritten
            return dataclasses.replace(after, tokens=None, output=shape)
    return dataclasses.replace(after, tokens=axes[0] if len(axes) == 1 else None)


def _checked(params: PyTree) -> PyTree:
    for path, leaf in _paths.leaves(params).items():
        if not is_array(leaf) and not is_quantized(leaf):
            raise TypeError(
                f'params must hold arrays only; {path!r} is {leaf!r}. Keep it out of params '
                '(equinox: eqx.partition(model, eqx.is_array))'
            )
    return params
