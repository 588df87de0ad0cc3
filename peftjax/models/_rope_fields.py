"""From the fields of a `config.json` to a `Rope`."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from peftjax.models._rope import Rope

Fields = Mapping[str, Any]


def read_rope(
    fields: Fields, head_dim: int, *, layers: str = 'full_attention', theta: float = 10000.0
) -> Rope:
    """Reads how queries and keys are rotated.

    Args:
      fields: of the file: `rope_parameters` (for all layers or for each kind of them), or
        `rope_theta`, `rope_scaling` and `partial_rotary_factor` of older files. `rope_scaling`
        goes first, as in transformers.
      head_dim: width of a head.
      layers: kind of layers, where the file distinguishes.
      theta: the family's default.

    Returns:
      The rotation.

    Raises:
      ValueError: an unknown scaling, one without its numbers, or with those of another.
    """
    given = _given(fields)
    if any(isinstance(value, Mapping) for value in given.values()):
        given = given.get(layers) or {}
    given = {name: value for name, value in given.items() if value is not None}
    dim = int(head_dim * given.get('partial_rotary_factor', fields.get('partial_rotary_factor', 1)))
    base = float(given.get('rope_theta', fields.get('rope_theta', theta)))
    scaling = _scaling(given)
    if scaling not in _READERS:
        raise ValueError(
            f'config rope_type must be one of {sorted(_READERS)}, got {scaling!r}: other '
            'rotations are not computed.'
        )
    reader, used = _READERS[scaling]
    beyond = sorted(set(given) - _SHARED - set(used))
    if beyond:
        raise ValueError(
            f'config rope_type {scaling!r} is computed of {list(used)}, and {beyond} would not be '
            'used. Name the rope_type that they belong to, or take them away.'
        )
    try:
        options = reader(given, fields)
    except KeyError as error:
        raise ValueError(
            f'config must hold {error.args[0]!r} for rope_type {scaling!r}, got {given}.'
        ) from error
    return Rope(dim=dim, theta=base, **options)


def rename_scaling(fields: Fields, names: Mapping[str, str]) -> Fields:
    """Calls kinds of scaling by the names they have now, where a family called them otherwise.

    Args:
      fields: of the file.
      names: the family's name of a kind -> the name of today.

    Returns:
      The fields, with the new name.

    Example:
      >>> rename_scaling({'rope_scaling': {'type': 'su'}}, {'su': 'longrope'})['rope_scaling']
      {'type': 'su', 'rope_type': 'longrope'}
    """
    given = _given(fields)
    old = _scaling(given)
    if old not in names:
        return fields
    return {**fields, 'rope_scaling': {**given, 'rope_type': names[old]}}


def _given(fields: Fields) -> Fields:
    return fields.get('rope_scaling') or fields.get('rope_parameters') or {}


def _scaling(given: Fields) -> str:
    return given.get('rope_type', given.get('type', 'default'))


def _default(given: Fields, fields: Fields) -> dict[str, Any]:
    return {}


def _linear(given: Fields, fields: Fields) -> dict[str, Any]:
    return {'scaling': 'linear', 'factor': given['factor']}


def _dynamic(given: Fields, fields: Fields) -> dict[str, Any]:
    most = fields['max_position_embeddings']
    return {'scaling': 'dynamic', 'factor': given['factor'], 'original': most}


def _llama3(given: Fields, fields: Fields) -> dict[str, Any]:
    return {
        'scaling': 'llama3',
        'factor': given['factor'],
        'original': _original(given, fields),
        'low': given['low_freq_factor'],
        'high': given['high_freq_factor'],
    }


def _yarn(given: Fields, fields: Fields) -> dict[str, Any]:
    original = _original(given, fields)
    factor = given.get('factor', fields.get('max_position_embeddings', original) / original)
    magnitude = given.get('attention_factor')
    if magnitude is None:
        own, all_dims = given.get('mscale', 0), given.get('mscale_all_dim', 0)
        given_both = own and all_dims
        magnitude = _temper(factor, own if given_both else 1)
        magnitude = magnitude / _temper(factor, all_dims) if given_both else magnitude
    return {
        'scaling': 'yarn',
        'factor': factor,
        'original': original,
        'low': given.get('beta_slow') or 1,
        'high': given.get('beta_fast') or 32,
        'whole': given.get('truncate', True),
        'magnitude': magnitude,
    }


def _longrope(given: Fields, fields: Fields) -> dict[str, Any]:
    original = _original(given, fields)
    factor = given.get('factor', fields['max_position_embeddings'] / original)
    magnitude = given.get('attention_factor')
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        'scaling': 'longrope',
        'original': original,
        'short': tuple(given['short_factor']),
        'long': tuple(given['long_factor']),
        'magnitude': magnitude,
    }


def _temper(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _original(given: Fields, fields: Fields) -> int:
    """Longest text of pretraining; some files say it outside of the rotation's own fields."""
    beside = fields.get('original_max_position_embeddings')
    inside = given.get('original_max_position_embeddings')
    return beside or inside or fields['max_position_embeddings']


# Fields that say nothing that another kind of scaling would compute.
_SHARED = {
    'rope_type',
    'type',
    'rope_theta',
    'partial_rotary_factor',
    'original_max_position_embeddings',
    'finetuned',
}

_YARN = (
    'factor', 'attention_factor', 'beta_fast', 'beta_slow', 'mscale', 'mscale_all_dim', 'truncate'
)  # fmt: skip

# Kind of scaling -> its reader, and the fields that it looks at.
_READERS: dict[str, tuple[Callable[[Fields, Fields], dict[str, Any]], tuple[str, ...]]] = {
    'default': (_default, ()),
    'linear': (_linear, ('factor',)),
    'dynamic': (_dynamic, ('factor',)),
    'llama3': (_llama3, ('factor', 'low_freq_factor', 'high_freq_factor')),
    'yarn': (_yarn, _YARN),
    'longrope': (_longrope, ('short_factor', 'long_factor', 'factor', 'attention_factor')),
}
