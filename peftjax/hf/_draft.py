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

Names = tuple[str, ...] | str
"""Of modules, or one regular expression."""


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


def plan_tokens(
    draft: Draft, stored: Stored, model: Model, key: str, ids: Mapping[Names, tuple[int, ...]]
) -> None:
    """Adds the rows of embeddings that were trained.

    Args:
      draft: to add to.
      stored: the adapter.
      model: the base.
      key: of the configuration that names the tables, for messages.
      ids: the tokens, by names of tables as of `target_modules`; without a name they are of every
        table that the adapter has rows of.

    Raises:
      CheckpointError: the configuration asks for rows that are not there.
      ValueError: it asks for those of something else than an embedding.
    """
    rows = [name.removesuffix(DELTA) for name in stored.tensors if name.endswith(DELTA)]
    there = [name for name, _ in model.table.adaptable()]
    owners: dict[str, tuple[int, ...]] = {}
    for names, tokens in ids.items():
        dead = unmatched([*there, *rows], names)
        draft.listed += [f'{key} {name!r}, which no module has' for name in dead]
        wanted = [name for name in there if targeted(name, {'target_modules': names})]
        if not names:
            wanted = [name for name in there if name in rows] or ['*']
        owners = dict.fromkeys(wanted, tokens) | owners
    require((f'{o}{DELTA}' for o in owners), stored.tensors, stored.where, 'all rows of tokens')
    for i, (owner, tokens) in enumerate(owners.items()):
        place = model.table.weight(owner)
        if place is not None and place.site.kind != 'embedding':
            raise ValueError(
                f'{stored.where}: {key} names {owner!r}, which is no embedding: tokens are rows of '
                'embeddings here, and columns of a head cannot be trained alone'
            )
        draft.methods[f'tokens_{i + 1}' if i else 'tokens'] = TrainableTokens(
            target=model.target(whole_leaves(model, [owner])), ids=tokens
        )
