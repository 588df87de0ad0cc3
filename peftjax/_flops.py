"""FLOPs of the products in a program, counted in its jaxpr.

The compiler's own count (`compiled.cost_analysis()`) takes the body of a loop once, whatever its
length: a model of 32 scanned layers counts as one. Here a scan's body counts as often as it runs.
"""

import math
from collections.abc import Callable
from typing import Any

from peftjax._jaxprs import inner


def flops(jaxpr: Any) -> float:
    """Two for each multiplication and addition of all products, those inside included.

    What is counted: `dot_general`, `ragged_dot` (each row goes through one group) and convolutions.
    Of a `cond` the dearest branch counts; a `while` whose length is not known before it runs counts
    once; elementwise operations and kernels that hide their products count nothing.

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
    return float(sum(map(_equation, jaxpr.eqns)))


def _equation(eqn: Any) -> float:
    name = eqn.primitive.name
    if name in _PRODUCTS:
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * _PRODUCTS[name](eqn)
    inside = [flops(one) for one in inner(eqn)]
    if name == 'cond':
        return max(inside)
    return sum(inside) * (eqn.params['length'] if name == 'scan' else 1)


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
