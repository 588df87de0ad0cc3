"""From LoRA, DoRA and IA3 to AdapterHub's `LoRAConfig`, which is all three."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from peftjax._lowrank import LowRankMethod
from peftjax._sites import Site, Sites
from peftjax.hf._config import whole
from peftjax.hf._hub_writing import Hub
from peftjax.hf._model import Model
from peftjax.hf._writing import Part
from peftjax.methods import Dora, Ia3

Tensors = dict[str, np.ndarray]
Thirds = tuple[int, ...]
"""Which of query, key and value are adapted in a layer that makes all three."""

FUSED = 'qkv'
CHOICES: tuple[Thirds, ...] = ((0, 2), (0, 1, 2), (0, 1), (1, 2), (0,), (1,), (2,))
"""The usual one first: that of an adapter that does nothing yet."""


class Adapted(NamedTuple):
    """A linear layer that is adapted.

    Attributes:
      module: its name.
      layer: the index of its layer.
      role: what it is there; see `Family`.
      site: of its weight.
    """

    module: str
    layer: int
    role: str
    site: Site


def write_hub_lora(hub: Hub, part: Part) -> list[dict[str, Any]]:
    """Adds the pairs of LoRA or DoRA; returns the configuration.

    Raises:
      ValueError: AdapterHub has no place for it.
    """
    method = part.method
    assert isinstance(method, LowRankMethod)
    adapted, tensors = _adapted(hub, part), hub.out.stored(part)
    thirds = _apart_pairs(adapted, tensors)
    if isinstance(method, Dora):
        _scale_all(hub, method, adapted, tensors)
    rank = lambda one: tensors[f'{one.module}.lora_B.weight'].shape[1]
    values = {(rank(one), method.scale_at(one.site)) for one in adapted}
    if len(values) > 1:
        raise ValueError(
            'AdapterHub has one rank and one alpha for all layers; these have ranks and scales '
            f'{sorted(values)}. Use save, or train them alike'
        )
    [(rank, scale)] = values
    _put(hub, adapted, tensors, {'lora_A.weight': 'lora_A', 'lora_B.weight': 'lora_B'})
    return [
        _config(hub, adapted, thirds)
        | {
            'alpha': whole(scale * rank),
            'composition_mode': 'add',
            'dropout': method.dropout,
            'init_weights': 'lora',
            'r': rank,
            'use_dora': isinstance(method, Dora),
        }
    ]


def write_hub_ia3(hub: Hub, part: Part) -> list[dict[str, Any]]:
    """Adds the vectors of IA3; returns the configuration.

    Raises:
      ValueError: AdapterHub has no place for it.
    """
    method = part.method
    assert isinstance(method, Ia3)
    if fed := [site.path for site in part.sites if method.feeds(site)]:
        raise ValueError(
            f'IA3 scales outputs in AdapterHub, and the input of {fed[0]!r} is scaled. Use save'
        )
    adapted, tensors = _adapted(hub, part), hub.out.stored(part)
    thirds = _apart_scales(adapted, tensors)
    _put(hub, adapted, tensors, {'ia3_l': 'lora_B'})
    return [
        _config(hub, adapted, thirds)
        | {
            'alpha': 1,
            'composition_mode': 'scale',
            'dropout': 0.0,
            'init_weights': 'ia3',
            'r': 1,
            'use_dora': False,
        }
    ]


def _adapted(hub: Hub, part: Part) -> list[Adapted]:
    """The layers of a method, each in its role, the same in all layers."""
    roles = {module: role for role, module in hub.about.family.roles}
    found = []
    for site in part.sites:
        for module in hub.out.table.modules(site.path):
            layer, inner = hub.layer(module)
            if inner not in roles or site.kind != 'linear':
                raise ValueError(
                    f'AdapterHub adapts {", ".join(roles)} in a layer of {hub.about.family.stem}; '
                    f'{site.path!r} is none of them. Leave it out of the target'
                )
            found.append(Adapted(module, layer, roles[inner], site))
    layers: dict[int, set[str]] = {}
    for one in found:
        layers.setdefault(one.layer, set()).add(one.role)
    first, *others = layers.items()
    if uneven := [one for one in others if one[1] != first[1]]:
        raise ValueError(
            f'AdapterHub adapts the same in all layers that it adapts; here {sorted(first[1])} in '
            f'layer {first[0]} and {sorted(uneven[0][1])} in layer {uneven[0][0]}. Use save'
        )
    return found


def _put(
    hub: Hub, adapted: Iterable[Adapted], tensors: Mapping[str, np.ndarray], ends: dict[str, str]
) -> None:
    body = f'{hub.about.family.body}.'
    ends = {**ends, 'lora_magnitude_vector': 'm.weight'}
    for one in adapted:
        named = {new: f'{one.module}.{old}' for old, new in ends.items()}
        found = {new: tensors[old] for new, old in named.items() if old in tensors}
        module = f'{one.module.removeprefix(body)}.loras.{hub.about.name}'
        hub.put(module, {n: t[:, None] if n == 'm.weight' else t for n, t in found.items()})


def _config(hub: Hub, adapted: Iterable[Adapted], thirds: Thirds) -> dict[str, Any]:
    roles = {one.role for one in adapted}
    matrices = [FUSED[i] for i in thirds] if FUSED in roles else [q for q in FUSED if q in roles]
    return {
        'architecture': 'lora',
        'attn_matrices': matrices or ['q', 'v'],
        'dtype': None,
        'init_weights_seed': None,
        'intermediate_lora': 'intermediate_lora' in roles,
        'leave_out': hub.left_out(one.layer for one in adapted),
        'output_lora': 'output_lora' in roles,
        'selfattn_lora': bool(matrices),
        'use_gating': False,
        'vera_b': None,
        'vera_d': None,
    }


# Query, key and value in one layer ----------------------------------------------------------------


def _apart_pairs(adapted: Iterable[Adapted], tensors: Tensors) -> Thirds:
    """Makes of one pair for all three one for each: of the ranks that it uses, or of all ranks."""
    names = [f'{one.module}.lora_B.weight' for one in adapted if one.role == FUSED]
    if not names:
        return ()
    fits = (thirds for thirds in CHOICES if all(_is_apart(tensors[n], thirds) for n in names))
    thirds = next(fits, None)
    for name in names:
        b, a = tensors[name], name.replace('lora_B', 'lora_A')
        if thirds is None:
            tensors[a] = np.tile(tensors[a], (3, 1))
        else:
            blocks = _blocks(b, len(thirds))
            tensors[name] = np.concatenate([blocks[third, :, i] for i, third in enumerate(thirds)])
    return (0, 1, 2) if thirds is None else thirds


def _blocks(b: np.ndarray, count: int) -> np.ndarray:
    """`(3 * out, count * rank)` to `(3, out, count, rank)`."""
    return b.reshape(3, b.shape[0] // 3, count, b.shape[1] // count)


def _is_apart(b: np.ndarray, thirds: Thirds) -> bool:
    """Whether each of some thirds of the outputs uses ranks of its own, and the others none."""
    if b.shape[1] % len(thirds):
        return False
    blocks = _blocks(b, len(thirds)).copy()
    for i, third in enumerate(thirds):
        blocks[third, :, i] = 0
    return not blocks.any()


def _apart_scales(adapted: Iterable[Adapted], tensors: Tensors) -> Thirds:
    """Leaves out the thirds that are not scaled in any layer."""
    names = [f'{one.module}.ia3_l' for one in adapted if one.role == FUSED]
    if not names:
        return ()
    scaled = tuple(i for i in range(3) if any((_third(tensors[n], i) != 1).any() for n in names))
    thirds = scaled or (1, 2)
    tensors |= {n: np.concatenate([_third(tensors[n], i) for i in thirds]) for n in names}
    return thirds


def _third(scale: np.ndarray, index: int) -> np.ndarray:
    return scale.reshape(3, -1, 1)[index]


# DoRA --------------------------------------------------------------------------------------------


def _scale_all(hub: Hub, method: Dora, adapted: Iterable[Adapted], tensors: Tensors) -> None:
    """AdapterHub computes `m / |w + ab| * (x w + bias + scale x ab)`, we
    `m / |w + scale ab| * (x w + scale x ab) + bias`: their magnitude is ours times the ratio of the
    norms, and a bias must have been trained to what theirs is scaled to.
    """
    model = None
    for one in adapted:
        if one.role == FUSED:
            raise ValueError(
                f'AdapterHub has a pair for each of query, key and value, and {one.site.path!r} '
                'makes them at once: its Dora has no counterpart. Use Lora'
            )
        scale, bias = method.scale_at(one.site), f'{one.module}.bias'
        if scale == 1 and not hub.out.has(bias):
            continue  # The same formula.
        model = model or _base(hub, one.site)
        w = np.asarray(model.value(f'{one.module}.weight'))
        a, b = (tensors[f'{one.module}.lora_{x}.weight'] for x in 'AB')
        magnitude = f'{one.module}.lora_magnitude_vector'
        gain = tensors[magnitude] / np.linalg.norm(w + scale * (b @ a), axis=1)
        tensors[magnitude] = gain * np.linalg.norm(w + b @ a, axis=1)
        trained = hub.saved.pop(bias, None)
        if hub.out.has(bias) and (trained is None or not _near(trained, gain * model.value(bias))):
            raise ValueError(
                f"the bias of a layer is scaled with its output in AdapterHub's Dora, and added "
                f'after it here: {one.site.path!r} has one that was not trained there. Use save'
            )


def _base(hub: Hub, site: Site) -> Model:
    """The values of the base."""
    if hub.about.params is None:
        raise ValueError(
            f"AdapterHub's Dora stands in relation to the base: the values of {site.path!r} are "
            'needed. Pass params'
        )
    sites = {site.path: site for part in hub.out.parts for site in part.sites}
    return Model(Sites(tuple(sites.values())), hub.about.params, hub.out.naming)


def _near(one: np.ndarray, other: np.ndarray) -> bool:
    return np.allclose(one, other, rtol=1e-4, atol=1e-6)
