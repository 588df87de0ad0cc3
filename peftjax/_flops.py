"""FLOPs of the products in a program, counted in its jaxpr.

The compiler's own count (`compiled.cost_analysis()`) takes the body of a loop once, whatever its
length: a model of 32 scanned layers counts as one. Here a scan's body counts as often as it runs.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from peftjax._jaxprs import Literal, inner, opened, scan_counts, turns


def flops(jaxpr: Any) -> float:
    """Two for each multiplication and addition of all products, those inside included.

    What is counted: `dot_general`, `ragged_dot` (each row goes through one group) and convolutions.
    Of a `cond` the dearest branch counts; a `while` whose length is not known before it runs counts
    once; elementwise operations and kernels that hide their products count nothing.

    What leads to no result is left out, as a compiler leaves it out; a result without numbers
    (`x[:0]`, of which only the dtype matters) is none.

    Args:
      jaxpr: closed or not, as from `jax.make_jaxpr` or `jax.jit(fn).trace(...).jaxpr`.

    Returns:
      The number.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x, w = jnp.ones((2, 3)), jnp.ones((5, 3, 3))
      >>> flops(jax.make_jaxpr(lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w))(x, w))
      180.0
    """
    inside, _ = opened(jaxpr)
    return _count(inside, [True] * len(inside.outvars))[0]


def _count(jaxpr: Any, wanted: Sequence[bool]) -> tuple[float, list[bool]]:
    """The count for some of the results, and which of the arguments these need."""
    live = {var for var, w in zip(jaxpr.outvars, wanted, strict=True) if w and _matters(var)}
    total = 0.0
    for eqn in reversed(jaxpr.eqns):
        asked = [var in live for var in eqn.outvars]
        if any(asked) or eqn.effects:
            count, needed = _equation(eqn, asked)
            total += count
            live |= {v for v, n in zip(eqn.invars, needed, strict=True) if n and _matters(v)}
    return total, [var in live for var in jaxpr.invars]


def _matters(var: Any) -> bool:
    """Whether it is a variable, with numbers."""
    return not isinstance(var, Literal) and math.prod(getattr(var.aval, 'shape', ())) > 0


def _equation(eqn: Any, asked: Sequence[bool]) -> tuple[float, list[bool]]:
    name = eqn.primitive.name
    every = [True] * len(eqn.invars)
    if name in _PRODUCTS:
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * _PRODUCTS[name](eqn), every
    bodies = [opened(one)[0] for one in inner(eqn)]
    if name == 'scan':
        carries = scan_counts(eqn.params)[1]  # Each turn of the loop may need all of them.
        asked = [True] * carries + list(asked[carries:])
    same = name != 'while' and all(len(body.outvars) == len(asked) for body in bodies)
    found = [_count(body, asked if same else [True] * len(body.outvars)) for body in bodies]
    counts = [count for count, _ in found]
    if name == 'cond':
        return max(counts), every
    needed = found[0][1] if same and len(found) == 1 else every
    return sum(counts) * turns(eqn), needed if len(needed) == len(every) else every


def _summed_by_dot(eqn: Any) -> int:
    """How many numbers each result is a sum of."""
    (summed, _), _ = eqn.params['dimension_numbers']
    return math.prod(eqn.invars[0].aval.shape[axis] for axis in summed)


def _summed_by_ragged(eqn: Any) -> float:
    """As for a dot; where the groups lie along what is summed, each row is of one group."""
    numbers = eqn.params['ragged_dot_dimension_numbers']
    (summed, _), _ = numbers.dot_dimension_numbers
    shape = eqn.invars[0].aval.shape
    every = math.prod(shape[axis] for axis in summed)
    groups = eqn.invars[2].aval.shape[-1]
    return every / groups if set(numbers.lhs_ragged_dimensions) <= set(summed) else every


def _summed_by_conv(eqn: Any) -> float:
    kernel = eqn.invars[1].aval.shape
    return math.prod(kernel) / kernel[eqn.params['dimension_numbers'].rhs_spec[0]]


_PRODUCTS: dict[str, Callable[[Any], float]] = {
    'dot_general': _summed_by_dot,
    'ragged_dot_general': _summed_by_ragged,
    'conv_general_dilated': _summed_by_conv,
}
