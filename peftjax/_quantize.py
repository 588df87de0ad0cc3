"""A quantized base: weights of 4 or 8 bits under any apply function and any method (QLoRA).

A quantized leaf is made a weight where it is used: one layer of a scan at a time, some rows of a
table, once more in the backward pass; never a stack as a whole.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from peftjax import _paths
from peftjax._call import Call
from peftjax._dequantize import stand
from peftjax._interpret import evaluate
from peftjax._quantized import Quantized as Quantized
from peftjax._quantized import Scheme as Scheme
from peftjax._quantized import dequantize as dequantize
from peftjax._run import Run
from peftjax._types import ApplyFn, Array, Path, PyTree, Target

NF4 = Scheme(code='nf4')
"""Four bits with the levels of normal numbers: 4.13 bits a weight (Dettmers et al. 2023)."""

INT4 = Scheme(code='int4')
"""Four bits, fifteen equal steps."""

INT8 = Scheme(code='int8')
"""Eight bits, 255 equal steps."""


def quantize(params: PyTree, scheme: Scheme, *, target: Target) -> PyTree:
    """Quantizes chosen leaves, one after the other.

    Args:
      params: pytree of arrays, or of `jax.ShapeDtypeStruct`s, of which shapes are made.
      scheme: `pj.NF4`, `pj.INT4`, `pj.INT8`, or a `pj.Scheme`. A loader quantizes leaf by leaf
        with `scheme.quantize(array)`.
      target: regex, or several, searched in the paths of leaves. It says exactly what is
        quantized: leave out norms and biases (`q_proj/kernel`, not `q_proj`).

    Returns:
      The same tree with `pj.Quantized` nodes in place of those leaves, for `pj.attach`,
      `Peft.wrap` and `pj.quantized_apply`.

    Raises:
      ValueError: a pattern finds nothing, or a leaf without axes.
      TypeError: a leaf is not of a floating dtype, or quantized already.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params = {'up': {'kernel': jnp.ones((3, 4)), 'bias': jnp.zeros(4)}}
      >>> x = jnp.ones((2, 3))
      >>> def model(params, x):
      ...     return x @ params['up']['kernel'] + params['up']['bias']
      >>> quantized = pj.quantize(params, pj.NF4, target='kernel')
      >>> forward, phi = pj.lora_wrap(
      ...     model, quantized, x, key=jax.random.key(0), rank=2, target='kernel')
      >>> bool((forward(quantized, phi, x) == model(pj.dequantize(quantized), x)).all())
      True

    Reference: Dettmers et al. 2023, QLoRA, arXiv:2305.14314.
    """
    leaves = _paths.leaves(params)
    found = _paths.selected(target, leaves)
    return _paths.replace(params, {path: scheme.quantize(leaves[path], path) for path in found})


def quantized_apply(apply_fn: ApplyFn) -> ApplyFn:
    """Lets an apply function take quantized parameters, with no method above them.

    Args:
      apply_fn: `apply_fn(params, *args, **kwargs)`, any pure function.

    Returns:
      The same function of `params` whose leaves may be quantized, not yet jitted.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params, x = {'kernel': jnp.eye(4)}, jnp.ones((2, 4))
      >>> forward = jax.jit(pj.quantized_apply(lambda params, x: x @ params['kernel']))
      >>> forward(pj.quantize(params, pj.INT8, target='kernel'), x).shape
      (2, 4)
    """

    def forward(params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        """The function, with quantized leaves made weights where they are used."""
        call = Call(apply_fn, params, args, kwargs)
        leaves = [stand(path, leaf) for path, leaf in call.leaves.items()]
        outs = evaluate(call.flat, leaves, call.inputs, Run({}, {}))
        return jax.tree.unflatten(call.out, outs)

    return forward


class Requantized(NamedTuple):
    """What `requantize` returns: `params, error = …`."""

    params: PyTree
    error: Mapping[Path, Array]


def requantize(params: PyTree, *, like: PyTree) -> Requantized:
    """Quantizes those leaves that another tree has quantized, and tells the error.

    Merging into a quantized base is explicit: dequantize, merge, round again.

    Args:
      params: ordinary parameters, such as `peft.merge(pj.dequantize(base), phi)`.
      like: a tree with the same paths, whose quantized leaves say what to quantize and how.

    Returns:
      `(params, error)`: for each quantized path the norm of what rounding changed over the norm of
      the weight.

    Raises:
      ValueError: a leaf that `like` has quantized is missing, or has another shape.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> base = pj.quantize({'w': jnp.eye(4)}, pj.INT8, target='w')
      >>> merged = {'w': pj.dequantize(base)['w'] + 0.1}
      >>> params, error = pj.requantize(merged, like=base)
      >>> {path: float(e) < 0.01 for path, e in error.items()}
      {'w': True}
    """
    leaves, new, error = _paths.leaves(params), {}, {}
    for path, leaf in _paths.leaves(like).items():
        if not isinstance(leaf, Quantized):
            continue
        mine = leaves.get(path)
        if mine is None or tuple(mine.shape) != leaf.shape:
            raise ValueError(
                f'params must have the leaves of like; {path!r} has shape {leaf.shape} there and '
                f'is {"missing" if mine is None else tuple(mine.shape)} here'
            )
        new[path] = leaf.scheme.quantize(mine, path)
        error[path] = _error(mine, new[path])
    return Requantized(_paths.replace(params, new), error)


@jax.jit
def _error(w: Array, leaf: Quantized) -> Array:
    """The norm of the rounding over that of the weight."""
    exact = w.astype(jnp.float32)
    off = jnp.linalg.norm((leaf.dequantize().astype(jnp.float32) - exact).reshape(-1))
    norm = jnp.linalg.norm(exact.reshape(-1))
    return off / jnp.where(norm > 0, norm, 1)
