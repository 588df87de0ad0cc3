"""Which adapters can be summed."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import jax.numpy as jnp
from jax.core import Tracer

from peftjax._leaf import LeafMethod
from peftjax._method import Method, float32
from peftjax._peft import Peft
from peftjax._types import Array, Phi
from peftjax.methods.ia3 import Ia3
from peftjax.methods.lora import Lora
from peftjax.methods.trainable_tokens import TrainableTokens

Adapter: TypeAlias = tuple[Peft, Phi]
"""A plan and its phi."""


class Held(Protocol):
    """What has both, as `pj.load` gives it."""

    @property
    def peft(self) -> Peft: ...

    @property
    def phi(self) -> Phi: ...


Adapters: TypeAlias = Sequence[Adapter | Held]
"""What is to be summed."""


def checked(adapters: Adapters, weights: Sequence[float]) -> tuple[list[Adapter], Array]:
    """Adapters that can be summed, each as a pair, and their weights."""
    if isinstance(adapters, tuple) and adapters and isinstance(adapters[0], Peft):
        raise TypeError('adapters must be a list of them: received one. Give [adapter]')
    pairs = [_pair(number, adapter) for number, adapter in enumerate(adapters)]
    each = float32(jnp.asarray(weights, float))
    if not pairs or each.shape != (len(pairs),):
        given = f'{len(each)} weights' if each.ndim == 1 else f'weights of shape {each.shape}'
        raise ValueError(f'each adapter needs a weight; got {len(pairs)} adapters and {given}')
    if not isinstance(each, Tracer) and not jnp.isfinite(each).all():
        raise ValueError(f'weights must be finite; got {each.tolist()}')
    first = pairs[0][0]
    for number, (peft, phi) in enumerate(pairs):
        peft._check_phi(phi)
        if wrong := _difference(first, peft):
            raise ValueError(
                'adapters can be summed that change the same leaves of one model by the same kind '
                f'of method; adapter {number} {wrong}'
            )
    for (_, part), chosen in zip(first.method.parts, first.sites, strict=True):
        if not isinstance(part, Lora | LeafMethod | TrainableTokens | Ia3):
            raise ValueError(
                f'{type(part).__name__} at {chosen[0].path!r} has no update that adds up: sums are '
                'for Lora, for leaves trained in full, for TrainableTokens and Ia3. '
                f'{_mend(part)}'
            )
    return pairs, each


def _pair(number: int, adapter: Any) -> Adapter:
    if isinstance(getattr(adapter, 'peft', None), Peft):
        return adapter.peft, adapter.phi
    if isinstance(adapter, tuple) and len(adapter) == 2 and isinstance(adapter[0], Peft):
        return adapter
    raise TypeError(
        f'adapter {number} must be (peft, phi), or what pj.load gives: received '
        f'{type(adapter).__name__}'
    )


def _mend(part: Method) -> str:
    if part.mergeable:
        return 'Merge each, and sum the parameters'
    return 'Train one on both tasks, or use several at once (chain, mixed batches)'


def _difference(first: Peft, other: Peft) -> str:
    """How an adapter differs from the first one; empty where it can be summed with it."""
    shapes = [[(path, shape) for path, shape, _ in peft.leaves] for peft in (first, other)]
    if shapes[0] != shapes[1]:
        return 'is of another model: paths or shapes of the parameters differ'
    parts = [[(k, type(part).__name__) for k, part in peft.method.parts] for peft in (first, other)]
    if parts[0] != parts[1]:
        return f'is made of {_said(parts[1])}, the first of {_said(parts[0])}'
    for (_, one), (_, own), mine, theirs in zip(
        first.method.parts, other.method.parts, first.sites, other.sites, strict=True
    ):
        name = type(one).__name__
        paths = [{site.path for site in chosen} for chosen in (mine, theirs)]
        if odd := sorted(paths[0] ^ paths[1]):
            return f'has not the same sites of {name}: {", ".join(map(repr, odd[:5]))}'
        axes = [{s.path: (s.stack, s.inputs, s.outputs) for s in all_} for all_ in (mine, theirs)]
        if odd := [path for path in axes[0] if axes[0][path] != axes[1][path]]:
            return f'reads the axes of {odd[0]!r} otherwise'
        if isinstance(one, TrainableTokens) and isinstance(own, TrainableTokens):
            if one.ids != own.ids:
                return f'trains the tokens {own.ids}, the first {one.ids}'
        if isinstance(one, Ia3) and isinstance(own, Ia3):
            if odd := [site.path for site in mine if one.feeds(site) != own.feeds(site)]:
                return f'scales inputs at {odd[0]!r} where the other scales outputs'
    return ''


def _said(parts: Sequence[tuple[tuple[str, ...], str]]) -> str:
    return ', '.join(f'{name} ({"/".join(keys)})' if keys else name for keys, name in parts)
