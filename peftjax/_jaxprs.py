"""What jaxprs offer, alike in all versions of JAX: the only file that imports `jax.extend`."""

import math
from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex

Literal = jex.Literal
DropVar = jex.DropVar


def names(jaxpr: Any) -> list[str]:
    """The values that are named in a jaxpr and in those inside it, in order."""
    return [name for eqn in jaxpr.eqns for name in names_in(eqn)]


def names_in(eqn: Any) -> list[str]:
    """The values that an equation names, itself or inside."""
    if eqn.primitive.name == 'name':
        return [eqn.params['name']]
    return [name for one in inner(eqn) for name in names(one)]


def inner(eqn: Any) -> list[Any]:
    """The jaxprs inside an equation."""
    return list(jex.jaxprs_in_params(eqn.params))


def turns(eqn: Any) -> int:
    """How often the jaxpr inside an equation is run: in a loop, or on parts of arrays."""
    if eqn.primitive.name == 'scan':
        return eqn.params['length']
    if eqn.primitive.name == 'shard_map':  # inside, shapes are those of one device
        sizes = dict(eqn.params['mesh'].shape)
        return math.prod(sizes[axis] for axis in eqn.params.get('newly_manual_axes', sizes))
    return 1


def run_as_they_are(eqns: Sequence[Any], ins: Sequence[Any], outs: Sequence[Any], values: Any):
    """Evaluates untouched equations; keeps their name stacks, meshes and effects."""
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    blank = jex.DebugInfo('peftjax', 'untouched equations', ('',) * len(ins), ('',) * len(outs))
    jaxpr = jex.Jaxpr((), list(ins), list(outs), list(eqns), effects, blank)
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))(*values)


def bind(eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    """Evaluates one equation on other values of the same shapes."""
    fresh = jex.gensym()
    ins, outs = [fresh(v.aval) for v in eqn.invars], [fresh(v.aval) for v in eqn.outvars]
    return run_as_they_are([eqn.replace(invars=ins, outvars=outs)], ins, outs, values)


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and its constants, closed or not."""
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, 'consts') else (jaxpr, ())


def scan_counts(params: Any) -> tuple[int, int]:
    """How many of a scan's operands are constants and carries, in either version of JAX."""
    if 'num_consts' in params:
        return params['num_consts'], params['num_carry']
    consts, carry, _ = params['ft_in'].unpack()
    return len(list(consts.vals)), len(list(carry.vals))
