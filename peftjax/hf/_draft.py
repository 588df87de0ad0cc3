"""A plan in the making."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from peftjax._method import Method
from peftjax._types import Path
from peftjax.hf._config import Fields
from peftjax.hf._model import Model
from peftjax.hf._names import targeted, unmatched
from peftjax.hf._plan import Plan, Rewrite, require, saved_leaves, whole_leaves
from peftjax.hf._stored import Stored
from peftjax.methods import TrainableTokens

DELTA = '.trainable_tokens_delta'


@dataclasses.dataclass(eq=False)
class Draft:
    """What was found so far; see `Plan`.

    Attributes:
      methods: by name.
      rewrites: of tensors.
      saved: stored names of the parameters that are trained in full.
      idle: tensors that hold nothing new.
      tied: paths whose uses are all adapted alike.
      listed: keys without effect.
      unknown: keys that nobody knows, with their values.
      notes: what the user should know.
    """

    methods: dict[str, Method] = dataclasses.field(default_factory=dict)
    rewrites: list[Rewrite] = dataclasses.field(default_factory=list)
    saved: set[str] = dataclasses.field(default_factory=set)
    idle: set[str] = dataclasses.field(default_factory=set)
    tied: set[Path] = dataclasses.field(default_factory=set)
    listed: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    unknown: dict[str, Any] = dataclasses.field(default_factory=dict)

    def note_idle(self, fields: Fields, keys: Iterable[str]) -> None:
        """Lists keys that have no effect on a trained adapter, where they are set."""
        self.listed += [key for key in keys if fields.value(key) not in (None, False, '', {}, [])]

    def plan(self, model: Model) -> Plan:
        """The plan."""
        methods = dict(self.methods)
        if self.saved:
            methods['saved'] = saved_leaves(model, self.saved)
        return Plan(
            methods,
            tuple(self.rewrites),
            frozenset(self.idle),
            tuple(self.listed),
            tuple(self.notes),
            tuple(f'{key}={value!r:.60}' for key, value in self.unknown.items()),
        )


def adapted(
    model: Model,
    stored: Stored,
    rule: Mapping[str, Any],
    suffixes: tuple[str, ...],
    draft: Draft,
) -> dict[Path, tuple[str, ...]]:
    """The leaves that an adapter has tensors for and its configuration asks for.

    Args:
      model: the base.
      stored: the adapter.
      rule: as of `targeted`; without `target_modules`, the tensors alone say it.
      suffixes: of the tensors, at a module's name.
      draft: where names are listed that no module has.

    Returns:
      For each path the stored names of its modules.

    Raises:
      CheckpointError: the configuration asks for a module without tensors.
      ValueError: as of `whole_leaves`.
    """
    ends = ((name, end) for name in stored.tensors for end in suffixes if name.endswith(end))
    owners = dict.fromkeys(name.removesuffix(end) for name, end in ends)
    found = [name for name in owners if model.table.weight(name) is not None]
    if rule.get('target_modules', ()) not in ((), 'all-linear'):
        there = [name for name, _ in model.table.adaptable()]
        dead = unmatched([*there, *found], rule['target_modules'])
        draft.listed += [f'target_modules {name!r}, which no module has' for name in dead]
        wanted = [name for name in there if targeted(name, rule)]
        require(wanted, found, stored.where, f'{" or ".join(suffixes)} for every module')
        found = [name for name in found if targeted(name, rule)]
    return whole_leaves(model, found)


def plan_tokens(draft: Draft, stored: Stored, model: Model, ids: Mapping[str, Any]) -> None:
    """Adds the rows of embeddings that were trained.

    Args:
      draft: to add to.
      stored: the adapter.
      model: the base.
      ids: for modules by the end of their names, `''` for any, the tokens.
    """
    owners = [name.removesuffix(DELTA) for name in stored.tensors if name.endswith(DELTA)]
    for i, owner in enumerate(o for o in owners if model.table.weight(o) is not None):
        fits = (v for end, v in ids.items() if not end or f'.{owner}'.endswith(f'.{end}'))
        tokens = next(fits, None)
        if tokens is None:
            continue
        target = model.target(whole_leaves(model, [owner]))
        draft.methods[f'tokens_{i + 1}' if i else 'tokens'] = TrainableTokens(
            target=target, ids=tuple(tokens)
        )
