"""`load_adapter`: an adapter of Hugging Face PEFT or AdapterHub as a plan and its phi."""

import dataclasses
import os
import warnings
from collections.abc import Mapping
from typing import Any

from peftjax import _manifest, _names, _paths
from peftjax._attach import attach
from peftjax._discover import sites
from peftjax._manifest import CheckpointError
from peftjax._peft import Peft
from peftjax._types import ApplyFn, Phi, PyTree
from peftjax._virtual import POSITIONS
from peftjax.hf._config import Fields
from peftjax.hf._from_hub import plan_hub
from peftjax.hf._from_peft import check_kind, plan_peft
from peftjax.hf._layout import Layout
from peftjax.hf._model import Model
from peftjax.hf._names import Naming, hugging_face_name
from peftjax.hf._plan import Key, Plan, check, fill, layouts
from peftjax.hf._stored import Stored, read_stored


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter that another library wrote.

    Attributes:
      peft: the plan: `peft.wrap(apply_fn)` computes what that library computes.
      phi: its arrays.
      kind: `peft_type`, or `adapterhub` and its architecture.
      base_model: name of the base, where the configuration says one.
      config: the configuration as it stands.
      unused: keys of the configuration that are set and have no effect on a trained adapter.
      ignored: with `strict=False`, unknown keys and tensors without a place here.
      notes: what the user should know.
      head: what AdapterHub says of a prediction head; `save_adapter` takes it.
      verified: whether a manifest of ours was there and every file was as sealed. Foreign folders
        have none: damage to their values is not noticed.
    """

    peft: Peft
    phi: Phi
    kind: str
    base_model: str | None
    config: dict[str, Any]
    unused: tuple[str, ...]
    ignored: tuple[str, ...]
    notes: tuple[str, ...]
    head: dict[str, Any] | None
    verified: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """A stored adapter and how it fills phi; `load_adapter` without the last step."""

    stored: Stored
    plan: Plan
    peft: Peft
    layouts: Mapping[Key, Layout]
    fields: Fields
    ignored: tuple[str, ...]

    def phi(self, tensors: Mapping[str, Any]) -> Phi:
        """Phi of tensors named as those in `stored`; differentiable."""
        return fill(self.layouts, self.plan.rewritten(tensors))


def load_adapter(
    directory: str | os.PathLike[str],
    apply_fn: ApplyFn,
    params: PyTree,
    *args: Any,
    names: Naming = hugging_face_name,
    strict: bool = True,
    allow_nonfinite: bool = False,
    **kwargs: Any,
) -> LoadedAdapter:
    """Loads an adapter that Hugging Face PEFT or AdapterHub wrote, over any apply function.

    The configuration becomes a method, the tensors become phi; forward, gradients and merged
    weights are those of that library. Layers may be scanned or unrolled here. Nothing is unpickled
    and no code is taken from the folder.

    Args:
      directory: with `adapter_config.json` and `adapter_model.safetensors` (AdapterHub:
        `adapter.safetensors`, and `model_head.safetensors` where there is a head).
      apply_fn: `apply_fn(params, *args, **kwargs)`, the base model.
      params: its parameters; shapes do, unless the adapter stands in relation to the values.
      *args: as for a call; arrays may be `jax.ShapeDtypeStruct`s.
      names: from the path of a parameter to its name in the Hugging Face model, with `{}` where the
        index of each of its stacked layers stands; needed where modules are called otherwise than
        there.
      strict: refuse what the configuration says and this version does not know, and tensors
        without a place; otherwise both are listed in `ignored`, with a warning.
      allow_nonfinite: take NaN and Inf.
      **kwargs: as for a call.

    Returns:
      The plan, phi, and what is known of the adapter.

    Raises:
      FileNotFoundError: there is no adapter in safetensors.
      CheckpointError: a file is damaged, a value of the wrong kind, or tensors are missing, of
        another shape, or without a place.
      ValueError: the adapter computes what cannot be represented here, or is not finite; or it is a
        prompt, and what the model multiplies embeddings with is no number.

    Warns:
      UserWarning: see `strict`, and `LoadedAdapter.notes`.

    Example:
      >>> loaded = load_adapter('my-lora', model.apply_fn, params, tokens)  # doctest: +SKIP
      >>> forward = jax.jit(loaded.peft.wrap(model.apply_fn))  # doctest: +SKIP
      >>> logits = forward(params, loaded.phi, tokens)  # doctest: +SKIP
    """
    folder = _names.local(directory)
    verified = (folder / _manifest.MANIFEST).is_file()
    if verified:
        _manifest.verify(folder, others=True)
    stored = read_stored(folder, allow_nonfinite=allow_nonfinite, check=check_kind)
    opened = open_adapter(stored, apply_fn, params, *args, names=names, strict=strict, **kwargs)
    fields, plan = opened.fields, opened.plan
    for note in plan.notes:
        warnings.warn(f'{str(folder)!r}: {note}', stacklevel=2)
    if opened.ignored:
        warnings.warn(f'{str(folder)!r}: ignored {", ".join(opened.ignored)}', stacklevel=2)
    kind = fields.text('peft_type') or f'adapterhub/{_architecture(stored.config)}'
    return LoadedAdapter(
        peft=opened.peft,
        phi=opened.phi(stored.tensors),
        kind=kind,
        base_model=fields.text('base_model_name_or_path') or fields.text('model_name') or None,
        config=dict(stored.config),
        unused=plan.listed,
        ignored=opened.ignored,
        notes=plan.notes,
        head=stored.head,
        verified=verified,
    )


def open_adapter(
    stored: Stored,
    apply_fn: ApplyFn,
    params: PyTree,
    *args: Any,
    names: Naming = hugging_face_name,
    strict: bool = True,
    **kwargs: Any,
) -> Opened:
    """All of `load_adapter` but reading and filling; see there."""
    model = Model(sites(apply_fn, params, *args, **kwargs), params, names)
    fields = Fields(stored.config, stored.where)
    plan = (plan_hub if stored.hub else plan_peft)(fields, stored, model)
    method = plan.method
    if plan.unknown and strict:
        raise CheckpointError(
            f'{stored.where}: every key must be known, since it may change what is computed; '
            f'unknown: {", ".join(plan.unknown[:10])} ({len(plan.unknown)} in all). Pass '
            'strict=False to ignore them'
        )
    _check_positions(plan, args, kwargs)
    peft = attach(method, apply_fn, params, *args, **kwargs)
    found = layouts(peft, model.table)
    extra = check(found, plan.rewritten(stored.tensors), stored)
    if extra and strict:
        raise CheckpointError(
            f'the adapter in {str(stored.folder)!r} must fit its configuration and the model; '
            f'without a place: {", ".join(map(repr, extra[:10]))} ({len(extra)} in all). Is it of '
            f'another base{_or_of_a_head(model)}? Pass strict=False to ignore them'
        )
    return Opened(stored, plan, peft, found, fields, (*plan.unknown, *extra))


def _or_of_a_head(model: Model) -> str:
    """Where a parameter has several uses, tensors of one of them have no place."""
    shared = ', '.join(map(repr, sorted(model.table.shared)))
    untie = 'adapt one whose head has a parameter of its own (tie_word_embeddings false)'
    return f', or of a head that this one ties to {shared} ({untie})' if shared else ''


def _check_positions(plan: Plan, args: Any, kwargs: Any) -> None:
    """AdapterHub's virtual tokens in front leave the positions of real tokens as they are."""
    leaves = _paths.leaves({**{str(i): arg for i, arg in enumerate(args)}, **kwargs})
    if any(path.rpartition('/')[2] in POSITIONS for path in leaves):
        return
    for part in plan.methods.values():
        room = part.virtual
        if room is not None and room.side == 'front' and not room.shift:
            raise ValueError(
                "AdapterHub's virtual tokens do not count in the positions of the real ones: "
                f'{type(part).__name__} needs positions among the arguments, by a keyword such as '
                f'{POSITIONS[0]}'
            )


def _architecture(config: Mapping[str, Any]) -> str:
    inner = config.get('config')
    return str(inner.get('architecture') or 'bottleneck') if isinstance(inner, dict) else ''
