"""Steps that change nothing, or theta; numbers that are not finite (R12, R13)."""

import contextlib
import io
import pathlib
import sys
import unittest.mock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from faults_kills import HERE, Count
from faults_run import Run, bits

import peftjax as pj
from peftjax import losses
from peftjax.cli import main

TESTS = HERE.parent / 'tests'


def methods() -> list[tuple[str, str, Any]]:
    """Every method of the tests, on the model with everything at once or with experts."""
    sys.path.insert(0, str(TESTS))
    from methods_under_test import CONVOLUTION, EVERYWHERE, EXPERTS

    tables = {'linen': EVERYWHERE, 'experts': EXPERTS, 'convolution': CONVOLUTION}
    return [(name, model, one) for model, table in tables.items() for name, one in table.items()]


def one_step(most: int | None = None) -> Count:
    """R12: after one step phi has changed, theta has not, bit for bit."""
    found = {f'{name} on {model}': changes(model, one) for name, model, one in methods()[:most]}
    wrong = {name: said for name, said in found.items() if said}
    kinds = {type(part).__name__ for _, _, one in methods()[:most] for _, part in one.parts}
    seen = {'methods': sorted(kinds), **({'wrong': wrong} if wrong else {})}
    return Count(len(found) - len(wrong), len(found), seen)


def changes(model: str, method: Any) -> str:
    """What is wrong after one step; nothing where all is right."""
    from blocks import MODELS

    case = MODELS[model]
    before = bits(case.params)
    peft = pj.attach(method, case.fn, case.params, case.inputs)
    forward, tx = peft.wrap(case.fn), optax.adam(1e-2)
    wanted = 0.9 * jax.jit(case.fn)(case.params, case.inputs)
    loss = lambda params, phi, x, key: ((forward(params, phi, x) - wanted) ** 2).mean()
    state = pj.start(tx, peft.init(jax.random.key(0), case.params), jax.random.key(1))
    first = bits(state.phi)
    state, _ = pj.train_step(loss, tx)(case.params, state, case.inputs)
    if bits(case.params) != before:
        return 'theta changed'
    return 'phi did not change' if bits(state.phi) == first else ''


BAD = 3
"""The step at which a number is not finite."""


def not_finite(place: pathlib.Path, quick: bool) -> Count:
    """R13: in data, loss, gradient, optimizer and evaluation, under each policy and by the command.

    A case is kept where 'skip' leaves phi as it was and counts it, 'stop' ends with an error and a
    finite checkpoint, 'restore' goes on from one, and the command ends with an exit code that is
    not zero and leaves no adapter.
    """
    seen: dict[str, Any] = {}
    for fault in FAULTS:
        seen[fault] = told = {}
        if fault == 'evaluation' or not quick:
            told['command'] = command(place / f'cli-{fault}', fault)
        if fault != 'evaluation':  # `fit` knows none: it is one of the user's events
            told |= {policy: library(place / fault, fault, policy) for policy in POLICIES}
    kept = [all(said == 'kept' for said in told.values()) for told in seen.values()]
    return Count(sum(kept), len(kept), seen)


POLICIES = ('skip', 'stop', 'restore')


def library(place: pathlib.Path, fault: str, policy: str) -> str:
    """What `fit` makes of a fault at one step."""
    run = Run()
    tx = optax.chain(DIRECTION, run.tx) if fault == 'optimizer' else run.tx
    phi = lambda: run.peft.init(jax.random.key(0), run.params)
    fresh = lambda: pj.start(tx, phi(), jax.random.key(1))
    step = pj.train_step(lambda *args: spoiled(run, fault, *args), tx)
    batches = Marked(run, float('nan') if fault == 'data' else 0.0)
    with run.checkpoints(place / policy) as saved:
        try:
            last = pj.fit(
                step, run.params, fresh(), batches,
                steps=6, checkpoints=saved, save_every=2, not_finite=policy,
            )  # fmt: skip
        except pj.NotFiniteError:
            last = None
        newest = saved.restore(fresh())
    if newest is None or not finite(newest.state):
        return 'the newest checkpoint is not finite'
    if policy == 'stop':
        return 'kept' if last is None and newest.step == BAD - 1 else 'not stopped in time'
    if last is None or not finite(last):
        return 'ended, or phi is not finite'
    return 'kept' if int(last.skipped) == 1 else f'{int(last.skipped)} steps are counted'


DIRECTION = optax.stateless(
    lambda grads, phi: jax.tree.map(lambda g: g / optax.tree.norm(grads), grads)
)
"""An optimizer that has no answer to a gradient of zeros."""


def spoiled(run: Run, fault: str, params: Any, phi: Any, batch: Any, key: Any) -> Any:
    """A loss in which a marker of one does nothing."""
    marker, batch = batch
    value = run.loss(params, phi, batch, key).mean
    if fault == 'loss':
        return value + jnp.log(marker)
    if fault == 'gradient':  # of a root at zero
        return value + jnp.sqrt(marker * jnp.square(phi['kernel']['a']).sum())
    return value * marker


class Marked:
    """Batches, each with a marker: one, and another number at the bad step."""

    def __init__(self, run: Run, bad: float):
        self._batches, self._count, self._bad = run.stream(), 0, bad

    def __iter__(self) -> 'Marked':
        return self

    def __next__(self) -> Any:
        self._count += 1
        return jnp.float32(self._bad if self._count == BAD else 1), next(self._batches)

    def state(self) -> Any:
        """Where it stands."""
        return {'batches': self._batches.state(), 'count': self._count}

    def restore(self, state: Any) -> None:
        """Goes there."""
        self._batches.restore(state['batches'])
        self._count = state['count']


def command(place: pathlib.Path, fault: str) -> str:
    """What `peftjax tune` on a tiny language model makes of a fault."""
    sys.path.insert(0, str(TESTS / 'cli'))
    from talker import write_colors, write_decoder

    place.mkdir(parents=True)
    model, rows = write_decoder(place / 'model'), write_colors(place / 'colors.jsonl')
    typed = ['tune', '--model', model, '--data', rows, '--eval-data', rows, '--length', '20']
    typed += ['--steps', '4', '--batch', '2', '--evaluations', '4', '--out', str(place / 'run')]
    said = io.StringIO()
    with FAULTS[fault](place), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(typed)
    if code == 0 or (place / 'run/adapter').exists():
        return f'exit code {code}, adapter exported: {(place / "run/adapter").exists()}'
    return 'kept' if 'finite' in said.getvalue() else said.getvalue()[-300:]


FIT = 'peftjax.cli.language._fit'


@contextlib.contextmanager
def bad_base(place: pathlib.Path) -> Any:
    """A model with a number that is none: the only data of a command that are numbers."""
    from safetensors.numpy import load_file, save_file

    file = place / 'model/model.safetensors'
    weights = load_file(file)
    weights['model.norm.weight'][0] = np.nan
    save_file(weights, file)
    yield


def bad_loss(place: pathlib.Path) -> Any:
    """A loss that overflows."""
    del place
    return changed('fused', lambda loss: lambda p, phi, *rest: times(loss(p, phi, *rest), jnp.inf))


def bad_gradient(place: pathlib.Path) -> Any:
    """A root at zero."""
    del place
    zero = lambda phi: jnp.sqrt(0 * sum(jnp.square(x).sum() for x in jax.tree.leaves(phi)))
    return changed('fused', lambda loss: lambda p, phi, *rest: plus(loss(p, phi, *rest), zero(phi)))


def changed(name: str, change: Any) -> Any:
    """The command with something that it makes changed."""
    import importlib

    made = getattr(importlib.import_module(FIT), name)
    return unittest.mock.patch(f'{FIT}.{name}', lambda *args: change(made(*args)))


def times(loss: losses.Loss, factor: Any) -> losses.Loss:
    return losses.Loss(loss.total * factor, loss.count)


def plus(loss: losses.Loss, more: Any) -> losses.Loss:
    return losses.Loss(loss.total + more, loss.count)


def bad_optimizer(place: pathlib.Path) -> Any:
    """Updates that are none."""
    del place
    none = optax.stateless(lambda grads, phi: jax.tree.map(lambda g: g * jnp.nan, grads))
    return unittest.mock.patch(f'{FIT}.optax.adamw', lambda *_, **__: none)


def bad_evaluation(place: pathlib.Path) -> Any:
    """The second evaluation finds nothing; the first is before any step."""
    del place
    found = iter([1.0, *[float('nan')] * 9])
    tell = lambda *_: {'evaluation_loss': next(found)}
    return unittest.mock.patch(f'{FIT}.Fitter.evaluate', tell)


FAULTS = {
    'data': bad_base,
    'loss': bad_loss,
    'gradient': bad_gradient,
    'optimizer': bad_optimizer,
    'evaluation': bad_evaluation,
}


def finite(state: Any) -> bool:
    """Whether phi is."""
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.phi))
