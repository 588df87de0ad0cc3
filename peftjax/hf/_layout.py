"""How an array of phi is stored: under which names, in which shape and orientation."""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from peftjax._leaf import LeafMethod
from peftjax._method import Method
from peftjax._sites import Site
from peftjax._types import Array
from peftjax.hf._names import CONV1D, Table
from peftjax.methods import Ia3

STORED = {
    'a': 'lora_A.weight',
    'b': 'lora_B.weight',
    'm': 'lora_magnitude_vector',
    'l': 'ia3_l',
    'rows': 'trainable_tokens_delta',
    'down': 'adapter_down.weight',
    'down_bias': 'adapter_down.bias',
    'up': 'adapter_up.weight',
    'up_bias': 'adapter_up.bias',
    'before_scale': 'adapter_norm_before.weight',
    'before_bias': 'adapter_norm_before.bias',
    'after_scale': 'adapter_norm_after.weight',
    'after_bias': 'adapter_norm_after.bias',
    'gate': 'gate.weight',
    'gate_bias': 'gate.bias',
    'scale': 'scaling',
}
"""What an array of phi is called in its module."""

EMBEDDING = {'a': 'lora_embedding_A', 'b': 'lora_embedding_B'}
"""The same at a table of embeddings."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """One stored tensor that holds an array of phi, or one layer of it.

    Attributes:
      name: of the tensor, in the one spelling that both libraries' names are brought to.
      shape: as stored.
      load: from what is stored to ours.
      store: the way back.
    """

    name: str
    shape: tuple[int, ...]
    load: Callable[[Array], Array]
    store: Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The tensors of one array of phi.

    Attributes:
      slots: one for each stacked layer.
      axes: the axes of our array along which those layers are stacked.
      sizes: of these axes.
    """

    slots: tuple[Slot, ...]
    axes: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()

    def load(self, tensors: list[Array]) -> Array:
        """Our array from the stored tensors."""
        each = [slot.load(jnp.asarray(t)) for slot, t in zip(self.slots, tensors, strict=True)]
        if not self.axes:
            return each[0]
        whole = jnp.stack(each).reshape(*self.sizes, *each[0].shape)
        return jnp.moveaxis(whole, range(len(self.axes)), self.axes)

    def store(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """The stored tensors from our array."""
        count = len(self.axes)
        whole = np.moveaxis(array, self.axes, range(count))
        each = whole.reshape(-1, *whole.shape[count:])
        made = (np.asarray(s.store(one)) for s, one in zip(self.slots, each, strict=True))
        return {slot.name: one for slot, one in zip(self.slots, made, strict=True)}


def layout(part: Method, site: Site, table: Table, name: str, shape: tuple[int, ...]) -> Layout:
    """How an array of phi at a site is stored.

    Args:
      part: the method.
      site: where.
      table: the names of the model.
      name: of the array.
      shape: of the array.

    Raises:
      ValueError: the format has no place for it.
    """
    stack = site.stack[: table.depth(site.path)]
    if isinstance(part, LeafMethod):
        make = lambda stored: _leaf(stored, site, stack)
        slots = tuple(map(make, table.parameters(site.path)))
        return Layout(slots, stack, site.sizes(stack))
    experts = site.stack[len(stack) :]
    if site.kind == 'convolution' or (experts and len(experts) > 1):
        raise ValueError(f'no place in this format for {site.path!r} ({site.kind})')
    axes = tuple(range(len(stack)))
    one = shape[len(stack) :]
    if table.is_raw(site.path) or experts:
        slots = tuple(_raw(owner, site, name, one) for owner in table.parameters(site.path))
    else:
        owners, column = table.modules(site.path), isinstance(part, Ia3) and not part.feeds(site)
        slots = tuple(_one(owner, site, name, one, column) for owner in owners)
    return Layout(slots, axes, shape[: len(stack)])


def _one(module: str, site: Site, name: str, shape: tuple[int, ...], column: bool) -> Slot:
    """An array of one module; IA3's vectors are columns at outputs and rows at inputs."""
    stored = f'{module}.{STORED[name]}'
    if site.kind == 'embedding' and name in EMBEDDING:
        stored = f'{module}.{EMBEDDING[name]}'
    if name in ('a', 'down', 'gate'):
        two = math.prod(shape[:-1]), shape[-1]
    elif name in ('b', 'up', 'rows'):
        two = shape[0], math.prod(shape[1:])
    else:
        size = math.prod(shape)
        vector = ((size, 1) if column else (1, size)) if name == 'l' else (size,)
        return _reshaped(stored, vector, shape)
    if name == 'rows':
        return _reshaped(stored, two, shape)
    return Slot(stored, two[::-1], lambda t: t.T.reshape(shape), lambda p: p.reshape(two).T)


def _reshaped(name: str, stored: tuple[int, ...], shape: tuple[int, ...]) -> Slot:
    return Slot(name, stored, lambda t: t.reshape(shape), lambda p: p.reshape(stored))


def _leaf(name: str, site: Site, stack: tuple[int, ...]) -> Slot:
    """A parameter itself: PyTorch keeps linear weights `(out, in)`, tables `(rows, width)`."""
    left = [axis for axis in range(site.rank) if axis not in stack]
    shape = site.sizes(left)
    module, _, leaf = name.rpartition('.')
    if leaf != 'weight' or site.kind not in ('linear', 'embedding'):
        return _reshaped(name, shape if leaf != 'bias' else (math.prod(shape),), shape)
    ahead, behind = site.outputs, site.inputs
    if site.kind == 'embedding' or module.rpartition('.')[2] in CONV1D:
        ahead, behind = behind, ahead
    order = [left.index(axis) for axis in (*ahead, *behind)]
    stored = math.prod(site.sizes(ahead)), math.prod(site.sizes(behind))
    sizes = site.sizes((*ahead, *behind))
    back = tuple(int(axis) for axis in np.argsort(order))
    return Slot(
        name,
        stored,
        lambda t: t.reshape(sizes).transpose(back),
        lambda p: p.transpose(order).reshape(stored),
    )


def _raw(parameter: str, site: Site, name: str, shape: tuple[int, ...]) -> Slot:
    """A factor of a parameter of experts `(experts, first, second)`: PEFT's `target_parameters`.

    `lora_A: (experts * rank, second)`, the expert slowest, and `lora_B: (first, rank * experts)`,
    the expert fastest, whichever of the two axes the model sums over.
    """
    if name not in ('a', 'b') or len(site.inputs) != 1 or len(site.outputs) != 1:
        raise ValueError(
            f'PEFT keeps a pair for each expert; {name!r} at {site.path!r} is of another form: '
            f'summed over axes {site.inputs}, produced along {site.outputs}, one for each of '
            f'{site.stack}. Use each expert on inputs of its own in the model'
        )
    experts = shape[0] if len(shape) == 3 else 1
    rank, width = (shape[-1], shape[-2]) if name == 'a' else (shape[-2], shape[-1])
    axis = site.inputs[0] if name == 'a' else site.outputs[0]
    rank_last = name == 'a'
    if axis == site.rank - 1:  # as lora_A: (experts * rank, width)
        load = lambda t: _ordered(t.reshape(experts, rank, width), rank_last).reshape(shape)
        store = lambda p: _ordered(p.reshape(experts, *shape[-2:]), rank_last).reshape(-1, width)
        return Slot(f'{parameter}.lora_A.weight', (experts * rank, width), load, store)
    load = lambda t: _ordered(
        t.reshape(width, rank, experts).transpose(2, 1, 0), rank_last
    ).reshape(shape)
    store = lambda p: (
        _ordered(p.reshape(experts, *shape[-2:]), rank_last).transpose(2, 1, 0).reshape(width, -1)
    )
    return Slot(f'{parameter}.lora_B.weight', (width, rank * experts), load, store)


def _ordered(array: Array, swapped: bool) -> Array:
    """`(experts, rank, width)` to ours, and back."""
    return array.swapaxes(1, 2) if swapped else array
