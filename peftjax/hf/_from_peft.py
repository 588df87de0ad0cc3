"""From a configuration of Hugging Face PEFT to a plan."""

import re
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from peftjax._paths import matches
from peftjax.hf._config import Fields
from peftjax.hf._draft import DELTA, Draft, adapted, plan_tokens
from peftjax.hf._from_lora import plan_lora
from peftjax.hf._model import Model
from peftjax.hf._names import is_saved
from peftjax.hf._plan import Plan, require
from peftjax.hf._prefix import scale_note
from peftjax.hf._stacked import LayersDifferError
from peftjax.hf._stored import Stored
from peftjax.methods import Ia3, PrefixTuning, PromptTuning
from peftjax.methods.prompt import EMBEDDINGS

SUFFIX = re.compile(
    r'\.(lora_[AB]\.(weight|bias)|lora_embedding_[AB]|lora_magnitude_vector|ia3_l|'
    r'trainable_tokens_delta|weight|bias)$'
)
STARTS = {'RANDOM': 'random', 'SAMPLE_VOCAB': 'vocabulary'}
"""What a prompt starts from; of a text it is not known here which tokens it is."""

BOOKKEEPING = (
    'auto_mapping',
    'base_model_name_or_path',
    'inference_mode',
    'peft_type',
    'peft_version',
    'revision',
    'task_type',
)
"""Keys of every configuration that change nothing in what is computed."""


def plan_peft(fields: Fields, stored: Stored, model: Model) -> Plan:
    """What a `PeftConfig` asks for.

    Raises:
      CheckpointError: a value of the wrong kind, or tensors are missing.
      ValueError: it cannot be represented.
    """
    check_kind(fields)
    model.table.align(SUFFIX.sub('', name) for name in stored.tensors)
    draft = Draft()
    for key in BOOKKEEPING:
        fields.value(key)
    KINDS[fields.text('peft_type')](fields, stored, model, draft)
    _saved(fields, stored, model, draft)
    draft.unknown |= fields.rest()
    return draft.plan(model)


def check_kind(fields: Fields) -> None:
    """Refuses a method of PEFT that has no counterpart.

    Raises:
      CheckpointError: its name is no string.
      ValueError: it has none.
    """
    hub = 'peft_type' not in fields.config and 'config' in fields.config
    if not hub and (kind := fields.text('peft_type')) not in KINDS:
        raise ValueError(
            f'{fields.where}: peft_type must be one of {", ".join(KINDS)}; got {kind!r:.80}. '
            'Other methods of PEFT have no counterpart here'
        )


def _ia3(fields: Fields, stored: Stored, model: Model, draft: Draft) -> None:
    draft.note_idle(fields, ('fan_in_fan_out', 'init_ia3_weights'))
    rule = {key: fields.names(key) for key in ('target_modules', 'exclude_modules')}
    rule['modules_to_save'] = fields.names('modules_to_save')
    forward = fields.names('feedforward_modules')
    leaves = adapted(model, stored, rule, ('.ia3_l',), draft)
    inputs = [p for p, names in leaves.items() if _feeds_forward(names, forward)]
    target = model.target(inputs) if inputs else ()
    if leaves:
        draft.methods['ia3'] = Ia3(target=model.target(leaves), feedforward='|'.join(target))


def _feeds_forward(modules: tuple[str, ...], names: tuple[str, ...] | str) -> bool:
    """Whether the inputs of a layer are scaled; of a stack, in all layers or none."""
    if isinstance(names, str):
        fits = {re.fullmatch(names, module) is not None for module in modules}
    else:
        fits = {module.endswith(names) for module in modules}
    if len(fits) > 1:
        raise LayersDifferError(
            f'the layers of a stack are scaled alike; of {modules[0]!r} and those with it, some '
            'are feedforward_modules'
        )
    return fits == {True}


def _prompt(fields: Fields, stored: Stored, model: Model, draft: Draft) -> None:
    del stored
    draft.note_idle(
        fields, ('prompt_tuning_init_text', 'tokenizer_name_or_path', 'tokenizer_kwargs')
    )
    start = fields.text('prompt_tuning_init', 'RANDOM')
    if start not in STARTS:
        draft.note_idle(fields, ('prompt_tuning_init',))
    _prompt_of(fields, model, draft, STARTS.get(start, 'random'))


def _prompt_of(fields: Fields, model: Model, draft: Draft, initial: str) -> None:
    """A direct prompt."""
    method = PromptTuning(length=_length(fields, draft), initial=initial)
    draft.methods['prompt_tuning'] = method
    tables = (site for site in model.table.sites.values() if matches(EMBEDDINGS, site.path))
    draft.notes += scale_note(tables)


def _p_tuning(fields: Fields, stored: Stored, model: Model, draft: Draft) -> None:
    del stored
    keys = 'reparameterization_type', 'hidden_size', 'num_layers', 'dropout'
    draft.note_idle(fields, tuple(f'encoder_{key}' for key in keys))
    draft.notes.append(
        'PEFT does not store the encoder of a prompt: what it made is loaded, as a direct prompt'
    )
    _prompt_of(fields, model, draft, 'random')


def _prefix(fields: Fields, stored: Stored, model: Model, draft: Draft) -> None:
    del stored
    draft.note_idle(fields, ('encoder_hidden_size', 'init_weights'))
    if fields.flag('prefix_projection'):
        draft.notes.append(
            'PEFT does not store the projection of a prefix: what it made is loaded, as a direct '
            'prefix'
        )
    check_named(model)
    draft.methods['prefix_tuning'] = PrefixTuning(length=_length(fields, draft))


def check_named(model: Model) -> None:
    """Refuses a prefix where keys and values have no name.

    Raises:
      ValueError: they have none.
    """
    names = {path.partition('/')[0] for path in model.table.named}
    if not {'@key', '@value'} <= names:
        raise ValueError(
            'a prefix replaces keys after norms and rotations: the model must name them, '
            "jax.ad_checkpoint.checkpoint_name(x, 'key') and (x, 'value'); it names "
            f'{sorted(names)}'
        )


def _length(fields: Fields, draft: Draft) -> int:
    """The number of virtual tokens."""
    if fields.value('num_transformer_submodules', 1) != 1:
        raise ValueError(
            f'{fields.where}: num_transformer_submodules='
            f'{fields.value("num_transformer_submodules")!r:.40} cannot be represented: virtual '
            'tokens of an encoder and a decoder'
        )
    draft.note_idle(fields, ('token_dim', 'num_attention_heads', 'num_layers'))
    return fields.integer('num_virtual_tokens')


def _tokens(fields: Fields, stored: Stored, model: Model, draft: Draft) -> None:
    draft.note_idle(fields, ('init_weights', 'exclude_modules'))
    ids = {fields.names('target_modules'): fields.integers('token_indices')}
    plan_tokens(draft, stored, model, 'target_modules', ids)


def _saved(fields: Fields, stored: Stored, model: Model, draft: Draft) -> None:
    """Parameters that are trained in full, and copies of the base."""
    owners = fields.names('modules_to_save')
    owners = (owners,) if isinstance(owners, str) else owners
    every = model.table.stored_parameters()
    modules = [name.rpartition('.')[0] for name in (*every, *stored.tensors)]
    dead = [owner for owner in owners if not any(is_saved(m, (owner,)) for m in modules)]
    draft.listed += [f'modules_to_save {owner!r}, which no module has' for owner in dead]
    names = [name for name in every if is_saved(name.rpartition('.')[0], owners)]
    require(names, stored.tensors, stored.where, 'every parameter')
    draft.saved.update(names)
    # With bias='all' PEFT writes the biases of such a module once more, and those that it replaced.
    draft.idle.update(name for name in stored.tensors if '.original_module.' in name)
    draft.idle |= _once_more(stored, model)
    for name in stored.tensors:
        plain = name.endswith(('.weight', '.bias')) and model.place(name) is not None
        if plain and name not in draft.saved and name not in draft.idle:
            _check_copy(name, stored, model)
            draft.idle.add(name)
    for path in {place.site.path for n in draft.saved if (place := model.place(n)) is not None}:
        if path in model.table.shared and not fields.flag('ensure_weight_tying'):
            raise ValueError(
                f'{path!r} is used in several ways, such as embedding and head, and is trained for '
                'all of them; this adapter trains one. Give the head a parameter of its own in '
                'params'
            )


def _once_more(stored: Stored, model: Model) -> set[str]:
    """What a tied head has in common with the table: PEFT stores it for both."""
    ends = '.weight', DELTA
    named = [(name, end) for name in stored.tensors for end in ends if name.endswith(end)]
    places = {name: model.table.weight(name.removesuffix(end)) for name, end in named}
    tables = [
        (stored.tensors[name], end)
        for name, end in named
        if (place := places[name]) is not None and place.site.path in model.table.shared
    ]
    return {
        name
        for name, end in named
        if places[name] is None
        and any(end == kind and np.array_equal(stored.tensors[name], t) for t, kind in tables)
    }


def _check_copy(name: str, stored: Stored, model: Model) -> None:
    """A parameter beside the adapter, such as the table of an adapted embedding.

    It is the base's in the dtype of training, which need not be that in which the base is stored.
    """
    ours, place = np.asarray(model.value(name)), model.place(name)
    theirs = np.asarray(model.rounded(name, stored.tensors[name]))
    assert place is not None
    error = max(float(jnp.finfo(dtype).eps) for dtype in (place.site.dtype, jnp.bfloat16))
    if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=error, atol=error**2):
        raise ValueError(
            f'the adapter brings {stored.names[name]!r} along, which differs from the base: '
            f'shape {theirs.shape} beside {ours.shape}, or other values. Load the base that it was '
            'trained on, or put this tensor into params'
        )


KINDS: dict[str, Callable[[Fields, Stored, Model, Draft], None]] = {
    'LORA': plan_lora,
    'IA3': _ia3,
    'PROMPT_TUNING': _prompt,
    'P_TUNING': _p_tuning,
    'PREFIX_TUNING': _prefix,
    'TRAINABLE_TOKENS': _tokens,
}
