"""Evaluates a traced function with stand-ins in place of weights.

Equations that no stand-in enters are run as they are, many at a time.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from peftjax import _equations, _jaxprs, _paths
from peftjax._control import CALLS
from peftjax._method import At
from peftjax._pending import Companion, Pending, settled
from peftjax._record import ELEMENTWISE, Recorder
from peftjax._run import Run, numbered
from peftjax._standin import Hole, StandIn
from peftjax._types import Array, Path
from peftjax._uses import Named

SPECIAL = (StandIn, Pending)
"""Values that are no arrays."""


def evaluate(
    fn: Callable[..., Sequence[Any]], leaves: Sequence[Any], inputs: Sequence[Any], run: Run
) -> list[Any]:
    """Traces `fn(*leaves, *inputs)` and evaluates it with stand-ins among the leaves.

    Args:
      fn: from flat arrays to a flat sequence of arrays.
      leaves: arrays or stand-ins.
      inputs: arrays.
      run: what the evaluation carries along.

    Returns:
      The outputs, as arrays.
    """
    arguments = [*leaves, *inputs]
    closed = jax.make_jaxpr(fn)(*(_bottom(value) for value in arguments))
    places = numbered(_jaxprs.names(closed.jaxpr), run)
    run = dataclasses.replace(run, places=places)
    frame = Frame(closed.jaxpr, closed.consts, run, 0)
    return [frame.array(out, 'is an output') for out in frame.run(arguments)]


def _bottom(value: Any) -> Any:
    while isinstance(value, StandIn):
        value = value.w
    return value.struct if isinstance(value, Hole) else value


def _from_below(view: Any) -> list[StandIn]:
    """A stand-in and those below it, the lowest first."""
    return [*_from_below(view.w), view] if isinstance(view, StandIn) else []


class Frame:
    """The evaluation of one jaxpr.

    A value is an array, a stand-in, or a pending output. `place` counts named values, `here`
    equations.
    """

    def __init__(self, jaxpr: Any, consts: Sequence[Any], run: Run, place: int):
        self.jaxpr, self.ctx, self.place, self.here = jaxpr, run, place, 0
        self.env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        self.waiting: list[Any] = []

    def run(self, arguments: Sequence[Any]) -> list[Any]:
        """The outputs, with stand-ins and pending outputs among them."""
        self.env.update(zip(self.jaxpr.invars, arguments, strict=True))
        for here, eqn in enumerate(self.jaxpr.eqns):
            self.here = here
            named = len(_jaxprs.names_in(eqn)) if self.ctx.places else 0
            if self._touched(eqn, range(self.place, self.place + named)):
                self._flush()
                self._step(eqn)
            else:
                self.waiting.append(eqn)
            self.place += named
        self._flush()
        return [self.read(v) for v in self.jaxpr.outvars]

    def read(self, var: Any) -> Any:
        """The value of a variable or literal."""
        return var.val if isinstance(var, _jaxprs.Literal) else self.env[var]

    def settle(self, var: Any) -> Any:
        """The same; what was pending is resolved, once for all its readers."""
        value = self.read(var)
        if isinstance(value, Pending):
            self.env[var] = value = value.resolve()
        return value

    def array(self, value: Any, why: str) -> Any:
        """A value as an array; a stand-in gives its dense weight, and says why."""
        value = settled(value)
        if not isinstance(value, StandIn):
            return value
        if isinstance(value.rule, Recorder):
            value.rule.elsewhere(value, why, value.shape)
        self.serve(value, f'dense: {why}')
        return self.solid(value, value.dense(), why)

    def solid(self, before: Any, after: Any, why: str) -> Any:
        """`after`; notes it where a weight that was no array before has become one."""
        if isinstance(before, StandIn) and before.hollow:
            if not (isinstance(after, StandIn) and after.hollow):
                self.ctx.early.setdefault(before.path, {})[why] = None
        return after

    def serve(self, view: Any, how: str) -> None:
        """Notes how a use of a stand-in, and of those below it, was served."""
        while isinstance(view, StandIn):
            if view.rule.noted:
                self.ctx.served.setdefault(view.path, {})[how] = None
            view = view.w

    def _touched(self, eqn: Any, places: range) -> bool:
        if self.ctx.recorder is not None and len(places):
            return True
        if any(self.ctx.places[place] in self.ctx.named for place in places):
            return True
        # what an equation that was put off makes is not there yet, and an array
        held = [self.env.get(v) for v in eqn.invars if not isinstance(v, _jaxprs.Literal)]
        return any(isinstance(value, SPECIAL) for value in held)

    def _flush(self) -> None:
        """Runs the untouched equations that were put off, all at once."""
        if not self.waiting:
            return
        made = dict.fromkeys(v for eqn in self.waiting for v in eqn.outvars)
        free = dict.fromkeys(
            v
            for eqn in self.waiting
            for v in eqn.invars
            if not isinstance(v, _jaxprs.Literal) and v not in made
        )
        outs = [v for v in made if not isinstance(v, _jaxprs.DropVar)]
        values = [self.env[v] for v in free]
        self.env.update(
            zip(outs, _jaxprs.run_as_they_are(self.waiting, list(free), outs, values), strict=True)
        )
        self.waiting = []

    def _step(self, eqn: Any) -> None:
        """Evaluates one equation that something special enters."""
        call = CALLS.get(eqn.primitive.name)
        with eqn.ctx.manager:
            if call is not None:
                outs = call(self, eqn)
            elif not eqn.outvars:
                outs = self._look(eqn)
            else:
                self._note_scale(eqn)
                outs = self._move(eqn) or self._add_bias(eqn) or self._use(eqn)
                outs = outs or self._as_arrays(eqn)
        self.env.update(zip(eqn.outvars, outs, strict=True))

    def _as_arrays(self, eqn: Any) -> Sequence[Any]:
        """An equation that only knows arrays."""
        name = eqn.primitive.name
        values = [self.settle(v) for v in eqn.invars]
        outs = _jaxprs.bind(eqn, [self._operand(value, eqn) for value in values])
        return [self._name(eqn.outvars[0], outs[0])] if name == 'name' else outs

    def _look(self, eqn: Any) -> Sequence[Any]:
        """What is called for its effect alone, to print or to log, uses no leaf; all waits on."""
        values = [settled(self.read(v)) for v in eqn.invars]
        if self.ctx.recorder is not None:
            return _jaxprs.bind(eqn, [_bottom(value) for value in values])
        return _jaxprs.bind(eqn, [self.array(v, f'enters {eqn.primitive.name}') for v in values])

    def _operand(self, value: Any, eqn: Any) -> Any:
        """An operand of an equation that only knows arrays."""
        name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
        if isinstance(value, StandIn) and isinstance(value.rule, Recorder):
            if value.rule.elementwise(value, name, shape):
                return value.dense()
        return self.array(value, f'enters {name}')

    def _name(self, var: Any, value: Array) -> Any:
        """A named value, adapted where it is a site."""
        path = self.ctx.places[self.place]
        if self.ctx.recorder is not None:
            self.ctx.recorder.named(path, value, self.ctx.stack)
        for view in _from_below(self.ctx.named.get(path)):
            self.env[var] = value  # what a later source is made of
            use = Named(lambda x, w: x, 'named', (), (), tuple(range(len(view.dims))))
            value = view.rule.post(At(use, view, self.near(self.here)), value, value)
            self.serve(dataclasses.replace(view, w=None), 'efficient')
        return value

    def _move(self, eqn: Any) -> Sequence[Any] | None:
        """A layout operation on a stand-in or on a pending output."""
        if (shifted := self._shifted(eqn)) is not None:
            return shifted
        name = eqn.primitive.name
        first = self.read(eqn.invars[0])
        if isinstance(first, Pending):
            moves = _equations.back_and_forth(name, eqn.params, eqn.invars[0].aval.shape)
            if moves is None:
                return None
            (value,) = _jaxprs.bind(eqn, [first.value])
            return [dataclasses.replace(first, value=value, moves=(*first.moves, moves))]
        if not isinstance(first, StandIn):
            return None
        index = [self.settle(v) for v in eqn.invars[1:]]
        if any(isinstance(value, StandIn) for value in index):
            return None
        if name == 'split':
            return self._split(eqn, first)
        if name == 'slice' and isinstance(first.rule, Recorder):
            first = first.rule.cut(first, eqn.params['start_indices'], eqn.params['limit_indices'])
        layout = _equations.layout(name, eqn.params, first.dims, first.shape, index)
        moved = layout and first.move(layout, lambda w: _jaxprs.bind(eqn, [w, *index])[0])
        return moved and [self.solid(first, moved, f'enters {name}')]

    def _shifted(self, eqn: Any) -> Sequence[Any] | None:
        """While sites are discovered, `1 + w` still counts as the leaf."""
        name, values = eqn.primitive.name, [self.read(v) for v in eqn.invars]
        views = [i for i, value in enumerate(values) if isinstance(value, StandIn)]
        if self.ctx.recorder is None or name not in ELEMENTWISE or len(views) != 1:
            return None
        (i,) = views
        view, var = values[i], eqn.invars[1 - i]
        if not view.shape or var.aval.shape:
            return None
        other = self.settle(var)
        (w,) = _jaxprs.bind(eqn, [view.w, other] if i == 0 else [other, view.w])
        return [dataclasses.replace(view, w=w, rule=view.rule.shifted(f'enters {name}'))]

    def _split(self, eqn: Any, view: StandIn) -> Sequence[Any] | None:
        parts = []
        for i, cut in enumerate(_equations.split(eqn.params, view.dims, view.shape)):
            parts.append(view.move(cut, lambda w, i=i: _jaxprs.bind(eqn, [w])[i]))
        return None if any(part is None for part in parts) else parts

    def _add_bias(self, eqn: Any) -> Sequence[Any] | None:
        """An output plus the bias of the same module: it stays pending."""
        if eqn.primitive.name != 'add':
            return None
        left, right = (self.read(v) for v in eqn.invars)
        if isinstance(right, Pending):
            left, right = right, left
        if not isinstance(left, Pending) or not isinstance(right, StandIn):
            return None
        if _paths.parent(right.path) not in left.parents or right.path in {
            at.view.path for at, _, _ in left.steps
        }:
            return None
        if isinstance(right.rule, Recorder):
            if not right.rule.owned(right, left):
                return None
            right.rule.bias(right, left)
        elif not any(right.path in self.ctx.plan.biases[at.view.path] for at, _, _ in left.steps):
            return None
        (value,) = _jaxprs.bind(eqn, [left.value, right.dense()])
        return [dataclasses.replace(left, value=value, bias=(*left.bias, right))]

    def _note_scale(self, eqn: Any) -> None:
        """While sites are discovered, what an output is multiplied with at once is noted."""
        name = eqn.primitive.name
        if self.ctx.recorder is None or name not in _equations.SCALING:
            return
        values = [self.read(v) for v in eqn.invars]
        for i, output in enumerate(values):
            if isinstance(output, Pending):
                number = _equations.multiplier(name, values, i)
                self.env[eqn.invars[i]] = output.scaled(number)

    def _use(self, eqn: Any) -> Sequence[Any] | None:
        """The linear use of a weight."""
        values = [self.settle(v) for v in eqn.invars]
        uses = [use for i in range(len(values)) if (use := self._used(eqn, values, i)) is not None]
        if not uses:
            return None
        (use, x, view), *others = uses
        if self.ctx.recorder is None:
            x = self.array(x, 'meets another adapted weight')
            return [self._consume(use, x, view)]
        steps = tuple((At(use, view, self.near(self.here)), x, view.rule) for use, x, view in uses)
        return [Pending(use.run(_bottom(x), _bottom(view)), steps, eqn.ctx)]

    def _used(self, eqn: Any, values: Sequence[Any], position: int) -> tuple[Any, Any, Any] | None:
        """The use of one operand as the weight, its input, and the operand."""
        view, other = values[position], 1 if position == 0 else 0
        if not isinstance(view, StandIn) or isinstance(view.rule, Companion):
            return None

        def run(x: Any, w: Any) -> Array:
            new = {position: w, other: x}
            return _jaxprs.bind(eqn, [new.get(i, value) for i, value in enumerate(values)])[0]

        use = _equations.use(eqn.primitive.name, eqn.params, position, values, run)
        return use and (use, values[other], view)

    def _consume(self, use: Any, x: Any, w: Any) -> Any:
        """What an equation yields when a stand-in, perhaps over others, is its weight."""
        if not isinstance(w, StandIn):
            return use.run(x, w)
        at = At(use, w, self.near(self.here))
        if w.rule.deferred and not w.rule.fits(at):
            self._check_known(use, w.path)
            return self._consume(use, x, w.w)  # the method acts on another use of this leaf
        if not w.rule.fits(at):
            self.serve(w, 'dense: its factors do not lie along this use')
            return use.run(x, w.dense())
        self.serve(dataclasses.replace(w, w=None), 'efficient')
        y = w.rule.run(at, w.rule.pre(at, x), lambda x: self._consume(use, x, w.w))
        step = (at, x, w.rule)
        if isinstance(y, Pending):
            return dataclasses.replace(y, steps=(*y.steps, step))
        if not w.rule.deferred:
            return w.rule.post(at, x, y)
        return Pending(y, (step,), self.jaxpr.eqns[self.here].ctx)

    def _check_known(self, use: Any, path: Path) -> None:
        """Refuses the use of an adapted layer backwards, where nothing else is known of it."""
        if self.ctx.plan.alone.get(path) == use.kind:
            raise ValueError(
                f'the output of the layer of {path!r} is adapted, and this function uses the leaf '
                'in another way than the one that was attached to: as a derivative of the layer '
                'does, which would be that of the layer without the method. Differentiate the '
                'wrapped function, jax.grad(peft.wrap(fn), argnums=2); where it is no derivative, '
                'attach to a function that has both uses'
            )

    def near(self, here: int) -> Callable[[str], Array]:
        """Finds the named value nearest to an equation, before or after it.

        A later one is computed from what is known by then, as the untouched model would. The
        function raises a `ValueError` where there is none of that name in the same scope.
        """

        def source(name: str) -> Array:
            eqns = self.jaxpr.eqns
            found = [
                i
                for i, eqn in enumerate(eqns)
                if eqn.primitive.name == 'name' and eqn.params['name'] == name
            ]
            if not found:
                raise ValueError(
                    'source must name a value in the same scope as the target; there is no '
                    f'{name!r} there. Name it with jax.ad_checkpoint.checkpoint_name'
                )
            eqn = eqns[min(found, key=lambda i: abs(i - here))]
            known = self.env.get(eqn.outvars[0])
            return known if known is not None else self._ahead(eqn.invars[0])

        return source

    def _ahead(self, var: Any) -> Array:
        """Evaluates what a variable that is not yet known depends on."""
        needed, wanted = [], {var}
        for eqn in reversed(self.jaxpr.eqns):
            if wanted.intersection(eqn.outvars) and not any(v in self.env for v in eqn.outvars):
                needed.append(eqn)
                wanted.update(v for v in eqn.invars if not isinstance(v, _jaxprs.Literal))
        made = {v for eqn in needed for v in eqn.outvars}
        free = [v for v in wanted if v in self.env and v not in made]
        values = [self._raw(v) for v in free]
        return _jaxprs.run_as_they_are(needed[::-1], free, [var], values)[0]

    def _raw(self, var: Any) -> Array:
        """A value as the untouched model has it at this moment."""
        value = self.env[var]
        if isinstance(value, Pending):
            return value.value
        return value.dense() if isinstance(value, StandIn) else value

    def enter(
        self, jaxpr: Any, arguments: Sequence[Any], place: int, run: Run | None = None
    ) -> list[Any]:
        """Evaluates an inner jaxpr."""
        inner, consts = _jaxprs.opened(jaxpr)
        return Frame(inner, consts, run or self.ctx, place).run(arguments)

    def within(self, eqn: Any) -> dict[Path, StandIn]:
        """The stand-ins of the values that are named inside an equation."""
        inside = self.ctx.places[self.place : self.place + len(_jaxprs.names_in(eqn))]
        return {path: self.ctx.named[path] for path in inside if path in self.ctx.named}
