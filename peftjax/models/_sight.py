"""What a token sees: its position, and the keys that it attends to, in each kind of layer."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from peftjax.models._cache import Cache
from peftjax.models._decoder_config import LayerKind
from peftjax.models._rope import rotation

Array = jax.Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=['turn', 'mask'], meta_fields=['window', 'causal']
)
@dataclasses.dataclass(frozen=True)
class Sight:
    """What the layers of one kind need to know about the tokens.

    Attributes:
      turn: cosines and sines of `rotation`, or None where positions are learned.
      mask: bool `(batch or 1, tokens, keys)`, True at the keys to attend to. None: each token sees
        itself and those before.
      window: without a mask: how many of them.
      causal: whether tokens are keys; none of those after a token is then in its mask. True
        without one.
    """

    turn: tuple[Array, Array] | None
    mask: Array | None
    window: int | None
    causal: bool


class Places(NamedTuple):
    """Where tokens and keys are.

    Attributes:
      slot: int `(tokens,)` and `(keys,)`: causality goes by it.
      rank: int `(batch or 1, tokens)` and `(batch or 1, keys)`: how many real tokens come before.
        Windows go by it, so that padding takes no place in them.
      real: bool `(batch, tokens)` and `(batch, keys)`, or None where all are.
      segment: int `(batch, tokens)`, of both, or None.
    """

    slot: tuple[Array, Array]
    rank: tuple[Array, Array]
    real: tuple[Array, Array] | None
    segment: Array | None


def find_places(
    shape: tuple[int, ...],
    attention_mask: Array | None,
    segment_ids: Array | None,
    cache: Cache | None,
) -> tuple[Places, Cache | None]:
    """Counts tokens.

    Args:
      shape: `(batch, tokens)`.
      attention_mask: `(batch, tokens)`, nonzero at real tokens; None is all.
      segment_ids: int `(batch, tokens)`, equal within a text of a packed row.
      cache: what was read before.

    Returns:
      The places, and the cache with the tokens marked as read.

    Raises:
      ValueError: segments together with a cache, or more tokens than slots.
    """
    tokens = jnp.arange(shape[1], dtype=jnp.int32)
    real = None if attention_mask is None else attention_mask != 0
    if cache is None:
        rank = tokens[None] if real is None else _before(real)
        real = None if real is None else (real, real)
        return Places((tokens, tokens), (rank, rank), real, segment_ids), None
    slots = cache.mask.shape[1]
    if segment_ids is not None:
        raise ValueError('segment_ids are for packed rows, which are read without a cache.')
    if shape[1] > slots:
        raise ValueError(f'the cache must have a slot for every token: {shape[1]} > {slots}.')
    real = jnp.ones(shape, jnp.bool_) if real is None else real
    mask = lax.dynamic_update_slice_in_dim(cache.mask, real, cache.index, axis=1)
    rank = _before(mask)
    own = lax.dynamic_slice_in_dim(rank, cache.index, shape[1], axis=1)
    places = Places(
        (cache.index + tokens, jnp.arange(slots, dtype=jnp.int32)), (own, rank), (real, mask), None
    )
    return places, cache._replace(mask=mask, index=cache.index + shape[1])


def count_positions(places: Places) -> Array:
    """Positions of tokens: how many real tokens of the same text come before.

    Args:
      places: of the tokens.

    Returns:
      int `(batch or 1, tokens)`.
    """
    rank, segment = places.rank[0], places.segment
    if segment is None:
        return rank
    first = jnp.ones((segment.shape[0], 1), jnp.bool_)
    first = jnp.concatenate([first, segment[:, 1:] != segment[:, :-1]], axis=1)
    return rank - lax.cummax(jnp.where(first, rank, 0), axis=1)


def find_lengths(
    kinds: tuple[LayerKind, ...], places: Places, position_ids: Array, cache: Cache | None
) -> tuple[Array | None, Cache | None]:
    """How long the text is that each token is of, or may become in a cache: see `Rope`.

    Args:
      kinds: windows and rotations.
      places: of tokens and keys.
      position_ids: int `(batch or 1, tokens)`.
      cache: what was read before.

    Returns:
      int32 `(batch or 1, tokens or 1)`, or None where no rotation goes by it; and the cache, in
      which it stays as it is once it is known.

    Raises:
      ValueError: a cache without a place for it.
    """
    if not any(kind.by_length for kind in kinds):
        return None, cache
    slots = places.slot[1].shape[0]
    last = _last(places, position_ids.astype(jnp.int32))
    # At position 0 nothing is turned: what lies there, such as virtual tokens, decides nothing.
    length = jnp.where(last > 0, last + slots - places.slot[0][-1], 0)
    if cache is None:
        return length, None
    if cache.length is None:
        raise ValueError(
            'a rotation that goes by the length of a text needs its place in the cache; length is '
            "None. Make the cache by the model's own init_cache"
        )
    known = cache.length[:, None]
    length = jnp.where(known > 0, known, length)
    return length, cache._replace(length=length[:, 0])


def _last(places: Places, position_ids: Array) -> Array:
    """The last position of the text that each token is of, `(batch or 1, tokens or 1)`."""
    if places.real is not None:
        position_ids = jnp.where(places.real[0], position_ids, 0)
    if places.segment is None:
        return position_ids.max(axis=1, keepdims=True)
    same = places.segment[:, :, None] == places.segment[:, None]
    return jnp.where(same, position_ids[:, None], 0).max(axis=2)


def find_sights(
    kinds: tuple[LayerKind, ...],
    places: Places,
    position_ids: Array,
    length: Array | None = None,
) -> Sight:
    """What each kind of layer needs to know.

    Args:
      kinds: windows and rotations.
      places: of tokens and keys.
      position_ids: int `(batch or 1, tokens)`.
      length: of texts, as `find_lengths` returns it.

    Returns:
      One `Sight`; where there are several kinds, its arrays have a leading axis for them.
    """
    keys = places.slot[1].shape[0]
    windows = [_reach(kind.window, keys) for kind in kinds]
    tokens_are_keys = places.slot[0] is places.slot[1]
    plain = tokens_are_keys and places.real is None and places.segment is None
    sights = []
    for kind, window in zip(kinds, windows, strict=True):
        turn = None if kind.rope is None else rotation(kind.rope, position_ids, length)
        if plain and len(set(windows)) == 1:
            sights.append(Sight(turn, None, window, True))
        else:
            sights.append(Sight(turn, _mask(places, window), None, tokens_are_keys))
    return sights[0] if len(kinds) == 1 else jax.tree.map(lambda *x: jnp.stack(x), *sights)


def sight_of(sights: Sight, kinds: tuple[LayerKind, ...], kind: Array) -> Sight:
    """The sight of one layer.

    Args:
      sights: as `find_sights` returns it.
      kinds: as given to it.
      kind: int scalar, an index into them.

    Returns:
      That of the kind.
    """
    if len(kinds) == 1:
        return sights
    pick = functools.partial(lax.dynamic_index_in_dim, index=kind, keepdims=False)
    return jax.tree.map(pick, sights)


def causal_mask(tokens: int, window: int | None) -> Array:
    """The mask that a `Sight` without a mask stands for.

    Args:
      tokens: number of tokens, which are the keys.
      window: how many of them, itself included, a token sees. None is all before.

    Returns:
      bool `(1, tokens, tokens)`.

    Example:
      >>> causal_mask(3, 2)[0].astype(int)
      Array([[1, 0, 0],
             [1, 1, 0],
             [0, 1, 1]], dtype=int32)
    """
    places, _ = find_places((1, tokens), None, None, None)
    return _mask(places, window)


def _before(real: Array) -> Array:
    real = real.astype(jnp.int32)
    return jnp.cumsum(real, axis=1) - real


def _reach(window: int | None, keys: int) -> int | None:
    """None for a window that nothing lies outside of."""
    return None if window is None or window >= keys else window


def _mask(places: Places, window: int | None) -> Array:
    (token_slot, key_slot), (token_rank, key_rank) = places.slot, places.rank
    mask = (key_slot[None] <= token_slot[:, None])[None]
    if window is not None:
        mask = mask & (token_rank[:, :, None] - key_rank[:, None] < window)
    if places.real is not None:
        mask = mask & places.real[1][:, None]
    if places.segment is not None:
        mask = mask & (places.segment[:, :, None] == places.segment[:, None])
    return mask
