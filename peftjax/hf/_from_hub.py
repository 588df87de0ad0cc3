"""From a configuration of AdapterHub's `adapters` to a plan."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from peftjax._method import Method
from peftjax.hf._config import Fields
from peftjax.hf._draft import Draft
from peftjax.hf._from_hub_lora import plan_hub_lora
from peftjax.hf._from_peft import SUFFIX, check_named
from peftjax.hf._hub import STARTS, activation
from peftjax.hf._model import Model
from peftjax.hf._plan import Plan, require
from peftjax.hf._prefix import STORED
from peftjax.hf._stacked import LayersDifferError
from peftjax.hf._stored import Stored
from peftjax.methods import Adapter, PrefixTuning, PromptTuning

BOOKKEEPING = ('hidden_size', 'model_class', 'model_name', 'model_type', 'name', 'version')

BIDIRECTIONAL = (
    'albert',
    'bert',
    'camembert',
    'deberta',
    'deberta-v2',
    'distilbert',
    'electra',
    'mpnet',
    'roberta',
    'xlm-roberta',
)
"""Models in which virtual tokens may lie at the back, so that real ones keep their positions."""

NORM = {(0, 0): '', (1, 0): 'before', (0, 1): 'after', (1, 1): 'both'}

IDLE = ('dropout', 'init_weights_seed', 'stochastic_depth')
UNUSED_PHM = (
    'factorized_phm_W',
    'factorized_phm_rule',
    'hypercomplex_nonlinearity',
    'inv_adapter_reduction_factor',
    'learn_phm',
    'phm_bias',
    'phm_c_init',
    'phm_dim',
    'phm_init_range',
    'phm_rank',
    'shared_W_phm',
    'shared_phm_rule',
)
"""Keys that say more about what is refused where it is switched on."""

REFUSED = {
    'cross_adapter': 'adapters after cross-attention',
    'inv_adapter': 'an invertible adapter after the embeddings',
    'phm_layer': 'layers made of Kronecker products (Compacter)',
}


def plan_hub(fields: Fields, stored: Stored, model: Model) -> Plan:
    """What an `AdapterConfig` asks for.

    Raises:
      CheckpointError: a value of the wrong kind, or tensors are missing.
      ValueError: it cannot be represented.
    """
    plain = [n for n in stored.tensors if not n.startswith(('@', 'prefix.', 'prompt_'))]
    model.table.align(SUFFIX.sub('', name) for name in plain)
    for key in BOOKKEEPING:
        fields.value(key)
    inner = fields.value('config')
    if not isinstance(inner, dict):
        raise fields.wrong('config', 'an object', inner)
    several = [inner]
    if inner.get('architecture') == 'union':
        several = Fields(inner, fields.where).value('configs')
        if not isinstance(several, list) or not all(isinstance(one, dict) for one in several):
            raise fields.wrong('config/configs', 'a list of objects', several)
    draft = Draft()
    for one in several:
        part = Fields(one, fields.where)
        kind = part.text('architecture') or 'bottleneck'
        if kind not in KINDS:
            raise ValueError(
                f'{fields.where}: architecture must be one of {", ".join(KINDS)}; got '
                f'{kind!r:.80}. Other methods of AdapterHub have no counterpart here'
            )
        draft.note_idle(part, IDLE)
        KINDS[kind](part, stored, model, draft)
        draft.unknown |= part.rest()
    _check_gates(fields, draft.methods.values())
    _head(stored, model, draft)
    draft.unknown |= fields.rest()
    return draft.plan(model)


def _check_gates(fields: Fields, methods: Iterable[Method]) -> None:
    """A gate is a mean over tokens, and a prefix has tokens here that it has not there.

    Raises:
      ValueError: there are both.
    """
    gated = any(isinstance(one, Adapter) and one.gate for one in methods)
    if gated and any(isinstance(one, PrefixTuning) for one in methods):
        raise ValueError(
            f'{fields.where}: use_gating beside a prefix has no counterpart here: a gate is a '
            'mean over all tokens, those of the prefix among them'
        )


def _bottleneck(fields: Fields, stored: Stored, model: Model, draft: Draft) -> None:
    fields.refuse(REFUSED)
    for key in UNUSED_PHM:
        fields.value(key)
    places = {'attention': fields.flag('mh_adapter'), 'mlp': fields.flag('output_adapter')}
    for place, used in places.items():
        if used:
            draft.methods[f'adapter_{place}'] = _adapter(fields, place, stored, model, draft)


def _adapter(fields: Fields, place: str, stored: Stored, model: Model, draft: Draft) -> Adapter:
    """The adapter after one half of a block."""
    parallel, before = fields.flag('is_parallel'), fields.flag('ln_before')
    after, inner = fields.flag('ln_after'), fields.flag('adapter_residual_before_ln')
    source = f'@{place}_residual' if fields.flag('original_ln_before') else ''
    if after and not inner:
        raise ValueError(f'{fields.where}: no adapter here has its norm before its residual')
    if fields.value('residual_before_ln') is not True or not fields.flag('original_ln_after'):
        raise ValueError(
            f'{fields.where}: residual_before_ln and original_ln_after must be true; another '
            'residual stream has no counterpart here'
        )
    if parallel and place == 'attention':
        raise ValueError(f'{fields.where}: no adapter here is parallel to attention')
    if parallel and after:
        raise ValueError(f'{fields.where}: no parallel adapter here has a norm of its own sum')
    layers = _layers(place, fields.integers('leave_out'), stored, model)
    theirs = fields.text('non_linearity', 'relu')
    if not (ours := activation(theirs)):
        raise ValueError(f'{fields.where}: non_linearity {theirs!r:.60} has no counterpart here')
    start = fields.text('init_weights', 'bert')
    if start not in STARTS:
        draft.note_idle(fields, ('init_weights',))
    return Adapter(
        target=model.target(layers),
        source='@attention_residual' if parallel else source,
        activation=ours,
        initial=STARTS.get(start, 'identity'),
        scale=_scale(fields),
        norm=NORM[before, after],
        gate=fields.flag('use_gating'),
        **_reductions(fields, layers),
    )


def _layers(
    place: str, left_out: tuple[int, ...], stored: Stored, model: Model
) -> dict[str, tuple[int, ...]]:
    """The named values of a place, each with the layers that it stands for."""
    name = f'@{place}_output'
    found = {}
    for path in (p for p in model.table.named if p.partition('/')[0] == name):
        modules = model.table.modules(path)
        layers = tuple(int(module.rpartition('.')[2]) for module in modules)
        kept = [layer for layer in layers if layer not in left_out]
        require(
            (f'{name}.{layer}.adapter_down.weight' for layer in kept),
            stored.tensors,
            stored.where,
            'an adapter for every layer',
        )
        if 0 < len(kept) < len(layers):
            raise LayersDifferError(
                f'{path!r} is a stack of layers, adapted in all of them or none; this adapter '
                f'leaves out {left_out}'
            )
        if kept:
            found[path] = layers
    if not found:
        raise ValueError(
            f'an adapter of AdapterHub lies at {name}: the model must name that value with '
            'jax.ad_checkpoint.checkpoint_name'
        )
    return found


def _scale(fields: Fields) -> float | str:
    scale = fields.value('scaling', 1.0)
    return scale if scale in ('learned', 'channel') else fields.number('scaling', 1.0)


def _reductions(fields: Fields, layers: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Widths of the bottlenecks, which may differ from layer to layer."""
    found = fields.value('reduction_factor', 16)
    if not isinstance(found, dict):
        return {'reduction': fields.number('reduction_factor', 16)}
    factors = Fields(found, f'{fields.where}, reduction_factor')
    default = factors.number('default', 16)
    own = {
        path: {factors.number(str(layer), default) for layer in mine}
        for path, mine in layers.items()
    }
    if uneven := [path for path, values in own.items() if len(values) > 1]:
        raise LayersDifferError(
            f'the layers of a stack have adapters of one width; {uneven[0]!r} would have '
            f'{sorted(own[uneven[0]])} as reductions'
        )
    single = {path: values.pop() for path, values in own.items()}
    others = tuple((path, value) for path, value in single.items() if value != default)
    return {'reduction': default, 'reductions': others}


def _prefix(fields: Fields, stored: Stored, model: Model, draft: Draft) -> None:
    fields.refuse({'use_gating': 'a gated prefix', 'leave_out': 'layers without a prefix'})
    for key in ('cross_prefix', 'encoder_prefix', 'shared_gating'):
        fields.value(key)
    length, width = fields.integer('prefix_length', 30), fields.integer('bottleneck_size', 512)
    flat, activation = fields.flag('flat'), fields.text('non_linearity', 'tanh')
    if not flat and activation != 'tanh':
        raise ValueError(f'{fields.where}: non_linearity of a prefix must be tanh')
    check_named(model)
    if flat:
        draft.rewrites.append(lambda tensors: _flat(tensors, length))
    elif _reads_wider(stored, model):
        flat = True
        draft.rewrites.append(_made)
        draft.notes.append(
            'the network of the prefix reads tokens of another width than a key: what it makes is '
            'loaded, as a direct prefix'
        )
    draft.methods['prefix_tuning'] = PrefixTuning(
        length=length, projection=0 if flat else width, **_side(stored)
    )


def _reads_wider(stored: Stored, model: Model) -> bool:
    """Whether a network reads tokens as wide as the model, where keys are narrower."""
    tokens, up = (stored.tensors.get(f'prefix.{n}.weight') for n in ('wte', 'control_trans.2'))
    keys = [path for path in model.table.named if path.partition('/')[0] == '@key']
    layers = sum(len(model.table.modules(path)) for path in keys)
    return tokens is not None and up is not None and tokens.shape[1] != len(up) // (2 * layers)


def _made(tensors: dict[str, Any]) -> dict[str, Any]:
    """A network to the prefix that it makes."""
    names = ('wte', 'control_trans.0', 'control_trans.2')
    tokens, down, up = (jnp.asarray(tensors[f'prefix.{name}.weight']) for name in names)
    biases = (jnp.asarray(tensors[f'prefix.{name}.bias'])[None] for name in names[1:])
    down_bias, up_bias = biases
    made = jnp.tanh(tokens @ down.T + down_bias) @ up.T + up_bias
    left = {name: tensor for name, tensor in tensors.items() if not name.startswith('prefix.')}
    return {**left, STORED: made}


def _flat(tensors: dict[str, Any], length: int) -> dict[str, Any]:
    """One vector to one row for each virtual token."""
    found = dict(tensors)
    if 'prefix.control_trans' in found:
        vector = found.pop('prefix.control_trans')
        rows = length if vector.size % length == 0 else 1
        found[STORED] = vector.reshape(rows, -1)
    return found


def _side(stored: Stored) -> dict[str, Any]:
    """AdapterHub leaves the positions of real tokens as they are."""
    if stored.config.get('model_type') in BIDIRECTIONAL:
        return {'side': 'back'}
    return {'side': 'front', 'shift': False}


def _prompt(fields: Fields, stored: Stored, model: Model, draft: Draft) -> None:
    del model
    combine = fields.text('combine', 'prefix')
    if combine != 'prefix':
        raise ValueError(f'{fields.where}: combine={combine!r:.60} has no counterpart here')
    draft.note_idle(fields, ('prompt_init', 'prompt_init_text'))
    draft.methods['prompt_tuning'] = PromptTuning(
        target='@embeddings',
        length=fields.integer('prompt_length', 10),
        initial='random',
        **_side(stored),
    )


def _head(stored: Stored, model: Model, draft: Draft) -> None:
    """A prediction head, where the model has the same."""
    heads = [name for name in stored.tensors if name.startswith('heads.')]
    draft.saved.update(name for name in heads if model.place(name) is not None)
    if missing := [name for name in heads if name not in draft.saved]:
        draft.idle.update(missing)
        draft.notes.append(
            f'the prediction head is not loaded: the model has no {", ".join(missing[:3])}'
        )


KINDS: dict[str, Callable[[Fields, Stored, Model, Draft], None]] = {
    'bottleneck': _bottleneck,
    'lora': plan_hub_lora,
    'prefix_tuning': _prefix,
    'prompt_tuning': _prompt,
}
