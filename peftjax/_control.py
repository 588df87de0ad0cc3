"""Control flow that a stand-in enters, rebuilt with the public functions of JAX."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec, Sharding

from peftjax import _jaxprs, _layout
from peftjax._one_pass import recompute, sum_in_one_pass
from peftjax._pending import Pending, settled
from peftjax._record import Recorder
from peftjax._standin import StandIn
from peftjax._types import Path


class Frame(Protocol):
    """The evaluation of the jaxpr around, as `_interpret` does it."""

    ctx: Any
    place: int

    def read(self, var: Any) -> Any:
        """The value of a variable."""
        ...

    def settle(self, var: Any) -> Any:
        """The same; nothing waits any more."""
        ...

    def array(self, value: Any, why: str) -> Any:
        """A value as an array."""
        ...

    def solid(self, before: Any, after: Any, why: str) -> Any:
        """`after`; notes it where a weight that was no array before has become one."""
        ...

    def enter(self, jaxpr: Any, arguments: Sequence[Any], place: int, run: Any = None) -> list[Any]:
        """Evaluates an inner jaxpr."""
        ...

    def within(self, eqn: Any) -> dict[Path, StandIn]:
        """The stand-ins of the values that are named inside an equation."""
        ...


def _jit(frame: Frame, eqn: Any) -> Sequence[Any]:
    """The body of an inner jit is evaluated in place: what was pending may stay so."""
    values = [frame.read(v) for v in eqn.invars]
    values = map(_constrained, values, eqn.params['in_shardings'])
    outs = frame.enter(eqn.params['jaxpr'], list(values), frame.place)
    return list(map(_constrained, outs, eqn.params['out_shardings']))


def _constrained(value: Any, where: Any) -> Any:
    """A value laid out on the mesh as an inner jit asks."""
    if not isinstance(where, Sharding):
        return value
    if isinstance(value, Pending):
        return dataclasses.replace(value, value=_constrained(value.value, where))
    if isinstance(value, StandIn):
        return value.move(_layout.same(value.dims), lambda w: _constrained(w, where))
    return lax.with_sharding_constraint(value, where)


def _remat(frame: Frame, eqn: Any) -> Sequence[Any]:
    params = eqn.params
    values = [frame.settle(v) for v in eqn.invars]
    named = frame.within(eqn)

    def body(named: dict[Path, StandIn], values: Sequence[Any]) -> Sequence[Any]:
        run = dataclasses.replace(frame.ctx, named=named)
        return [settled(out) for out in frame.enter(params['jaxpr'], values, frame.place, run)]

    again = jax.checkpoint(body, prevent_cse=params['prevent_cse'], policy=params['policy'])
    return again(named, values)


def _scan(frame: Frame, eqn: Any) -> Sequence[Any]:
    params = eqn.params
    jaxpr, length = params['jaxpr'], params['length']
    n_consts, n_carry = _jaxprs.scan_counts(params)
    consts = [frame.settle(v) for v in eqn.invars[:n_consts]]
    carry, kept = _carried(frame, eqn, n_consts, jaxpr, n_consts, n_carry)
    xs = [frame.settle(v) for v in eqn.invars[n_consts + n_carry :]]
    xs = [
        frame.solid(x, x.lead(), 'is sliced by scan') if isinstance(x, StandIn) else x for x in xs
    ]
    named = frame.within(eqn)
    run = dataclasses.replace(frame.ctx, stack=(*frame.ctx.stack, length))

    def body(carry: Sequence[Any], sliced: Any) -> tuple[Sequence[Any], Sequence[Any]]:
        named, xs = sliced
        named = {path: view.body() for path, view in named.items()}
        xs = [x.body() if isinstance(x, StandIn) else x for x in xs]
        whole = [kept.get(i, value) for i, value in enumerate(carry)]
        inside = dataclasses.replace(run, named=named)
        outs = frame.enter(jaxpr, [*consts, *whole, *xs], frame.place, inside)
        outs = [
            carry[i] if i in kept else frame.array(o, 'leaves scan') for i, o in enumerate(outs)
        ]
        return outs[:n_carry], outs[n_carry:]

    how = {'length': length, 'reverse': params['reverse'], 'unroll': params['unroll']}
    carry, ys = lax.scan(body, carry, (named, xs), **how)
    return [*(kept.get(i, value) for i, value in enumerate(carry)), *ys]


def _carried(
    frame: Frame, eqn: Any, first: int, body: Any, body_first: int, count: int
) -> tuple[list[Any], dict[int, StandIn]]:
    """The carry of a loop; a stand-in that goes round unchanged is held outside of it.

    The carry begins at operand `first` of the equation and at argument `body_first` of the body.
    """
    body, _ = _jaxprs.opened(body)
    carry, kept = [], {}
    for i, var in enumerate(eqn.invars[first : first + count]):
        value = frame.settle(var)
        unchanged = body.outvars[i] is body.invars[body_first + i]
        if isinstance(value, StandIn) and unchanged:
            kept[i], value = value, jnp.zeros(())
        elif isinstance(value, StandIn):
            value = frame.array(value, f'enters {eqn.primitive.name}')
        carry.append(value)
    return carry, kept


def _while(frame: Frame, eqn: Any) -> Sequence[Any]:
    params = eqn.params
    n_cond, n_body = params['cond_nconsts'], params['body_nconsts']
    cond_consts = [frame.settle(v) for v in eqn.invars[:n_cond]]
    body_consts = [frame.settle(v) for v in eqn.invars[n_cond : n_cond + n_body]]
    body_jaxpr, cond_jaxpr = params['body_jaxpr'], params['cond_jaxpr']
    first = n_cond + n_body
    carry, kept = _carried(frame, eqn, first, body_jaxpr, n_body, len(eqn.invars) - first)
    cond_place, body_place = _places(frame, (cond_jaxpr, body_jaxpr))

    def whole(carry: Sequence[Any]) -> list[Any]:
        return [kept.get(i, value) for i, value in enumerate(carry)]

    def cond(carry: Sequence[Any]) -> Any:
        (out,) = frame.enter(cond_jaxpr, [*cond_consts, *whole(carry)], cond_place)
        return frame.array(out, 'leaves while')

    def body(carry: Sequence[Any]) -> Sequence[Any]:
        outs = frame.enter(body_jaxpr, [*body_consts, *whole(carry)], body_place)
        return [
            carry[i] if i in kept else frame.array(o, 'leaves while') for i, o in enumerate(outs)
        ]

    return whole(lax.while_loop(cond, body, carry))


def _places(frame: Frame, jaxprs: Sequence[Any]) -> list[int]:
    """Where the count of named values stands at the start of each inner jaxpr."""
    sizes = [len(_jaxprs.names(_jaxprs.opened(jaxpr)[0])) for jaxpr in jaxprs]
    return [frame.place + sum(sizes[:i]) for i in range(len(sizes))]


def _cond(frame: Frame, eqn: Any) -> Sequence[Any]:
    branches = eqn.params['branches']
    index, *values = (frame.settle(v) for v in eqn.invars)
    starts = _places(frame, branches)

    def branch(jaxpr: Any, place: int) -> Callable[..., Sequence[Any]]:
        return lambda *values: [
            frame.array(out, 'leaves cond') for out in frame.enter(jaxpr, values, place)
        ]

    bodies = [branch(*pair) for pair in zip(branches, starts, strict=True)]
    return lax.switch(index, bodies, *values)


def _custom(frame: Frame, eqn: Any) -> Sequence[Any]:
    """A call with a derivative rule of its own gets arrays; sites inside it are still found."""
    recorder = frame.ctx.recorder
    name = eqn.primitive.name
    if (loop := _loop(eqn)) is not None:
        return _sum(frame, eqn, loop)
    if recorder is None:
        inside = frame.within(eqn)
        for view in inside.values():
            raise ValueError(f'{view.path!r} is named inside a {name}: it cannot be adapted there')
        return _jaxprs.bind(
            eqn, [frame.array(frame.settle(v), f'enters {name}') for v in eqn.invars]
        )
    inside = f'inside {name}'
    values = [frame.settle(v) for v in eqn.invars]
    values = [
        dataclasses.replace(value, rule=value.rule.within(inside))
        if isinstance(value, StandIn) and isinstance(value.rule, Recorder)
        else value
        for value in values
    ]
    run = dataclasses.replace(frame.ctx, recorder=recorder.within(inside))
    outs = frame.enter(eqn.params['call_jaxpr'], values, frame.place, run)
    return [frame.array(out, inside) for out in outs]


def _loop(eqn: Any) -> Any:
    """The loop of a `sum_in_one_pass`, if the equation is one, of a scalar."""
    eqns = _jaxprs.opened(eqn.params['call_jaxpr'])[0].eqns
    if [e.primitive.name for e in eqns] != ['scan', 'reduce_sum'] or eqns[1].outvars[0].aval.shape:
        return None
    body = _jaxprs.opened(eqns[0].params['jaxpr'])[0].eqns
    marked = len(body) == 1 and body[0].params.get('policy') is recompute
    return eqns[0] if marked and not _jaxprs.names_in(eqns[0]) else None


def _sum(frame: Frame, eqn: Any, loop: Any) -> Sequence[Any]:
    """A sum whose derivative is found in the same pass: so it is with stand-ins, too."""
    whole, body = eqn.params['call_jaxpr'], loop.params['jaxpr']
    values = [frame.settle(v) for v in eqn.invars]
    if frame.ctx.recorder is not None:
        return frame.enter(whole, values, frame.place)
    values = _operands(whole, values, loop)
    count, _ = _jaxprs.scan_counts(loop.params)
    parts = [frame.array(value, 'is cut into parts') for value in values[count:]]
    (once,) = _jaxprs.opened(body)[0].eqns

    def part(shared: Sequence[Any], part: Sequence[Any]) -> Any:
        values = _operands(body, [*shared, *part], once)
        (out,) = frame.enter(once.params['jaxpr'], values, frame.place)
        return frame.array(out, 'leaves a part')

    return [sum_in_one_pass(part, values[:count], parts)]


def _operands(jaxpr: Any, values: Sequence[Any], eqn: Any) -> list[Any]:
    """The operands of an equation that reads nothing but the arguments of its jaxpr."""
    jaxpr, consts = _jaxprs.opened(jaxpr)
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, values, strict=True))
    return [v.val if isinstance(v, _jaxprs.Literal) else known[v] for v in eqn.invars]


def _shard_map(frame: Frame, eqn: Any) -> Sequence[Any]:
    params, recording = eqn.params, frame.ctx.recorder is not None
    values = [frame.settle(v) for v in eqn.invars]
    values = [
        frame.solid(value, value.solid(), 'enters shard_map')
        if isinstance(value, StandIn)
        else value
        for value in values
    ]
    for value, spec in zip(values, params['in_specs'], strict=True):
        if isinstance(value, StandIn) and value.rule.deferred and any(spec) and not recording:
            raise ValueError(
                f'the output of {value.path!r} cannot be adapted inside shard_map, where each '
                f'device holds a part of the weight ({spec}) and of its output. Use a method of '
                'the weight seam, or leave the path out of the target'
            )
    specs = [
        _specs(value, spec) if isinstance(value, StandIn) else spec
        for value, spec in zip(values, params['in_specs'], strict=True)
    ]

    def body(*values: Any) -> tuple[Any, ...]:
        outs = frame.enter(params['jaxpr'], values, frame.place)
        return tuple(frame.array(out, 'leaves shard_map') for out in outs)

    mapped = jax.shard_map(
        body,
        mesh=params['mesh'],
        in_specs=tuple(specs),
        out_specs=tuple(params['out_specs']),
        axis_names=params['newly_manual_axes'],
        check_vma=params['check_vma'],
    )
    return mapped(*values)


def _specs(view: Any, spec: PartitionSpec) -> Any:
    """A stand-in's factors lie on the mesh as the dimensions of the weight that they share."""
    if not isinstance(view, StandIn):
        return spec
    axes = (*spec, *(None,) * (len(view.dims) - len(spec)))
    laid = {}
    for name, order in view.orders:
        full = view.full(name)
        where = {order[d]: axis for d, axis in enumerate(axes) if full[d]}
        laid[name] = PartitionSpec(*(where.get(d) for d in range(view.laid[name].ndim)))
    return dataclasses.replace(view, w=_specs(view.w, spec), laid=laid)


CALLS: dict[str, Callable[[Frame, Any], Sequence[Any]]] = {
    'jit': _jit,
    'pjit': _jit,
    'remat': _remat,
    'remat2': _remat,
    'checkpoint': _remat,
    'scan': _scan,
    'while': _while,
    'cond': _cond,
    'custom_jvp_call': _custom,
    'custom_vjp_call': _custom,
    'shard_map': _shard_map,
}
"""How each primitive with a jaxpr inside is evaluated."""
