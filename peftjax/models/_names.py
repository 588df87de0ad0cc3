"""Which tensors of a Hugging Face checkpoint fill which parameter.

The rule is one table: a parameter's path with dots for slashes is the tensor's name, and the last
part translates by `LEAVES`. What families have of their own is a `Naming`; old spellings and
prefixes are brought to one form before.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

LEAVES = {'kernel': 'weight', 'scale': 'weight', 'embedding': 'weight', 'bias': 'bias'}
"""Flax leaf name -> PyTorch parameter name."""

OLD_SPELLINGS = ((r'\.gamma$', '.weight'), (r'\.beta$', '.bias'))
"""Names of TensorFlow's BERT, still found in old checkpoints."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Naming:
    """How the tensors of a family's checkpoints are named and laid out.

    Attributes:
      prefix: first part of the names, which a checkpoint may or may not have.
      stacks: modules of which there are several, numbered in the checkpoint, and how many.
      transposed: True: a `kernel (in, out)` is stored as `(out, in)`.
      heads: first part of the names that a target without that head may leave unused.
      buffers: regex of the tensors that are constants of the model, not parameters.
      twins: names that may be stored beside another of the same content: a tied head.
    """

    prefix: str
    stacks: Mapping[str, int]
    transposed: bool = True
    heads: tuple[str, ...] = ()
    buffers: str | None = None
    twins: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Source(NamedTuple):
    """Where one parameter comes from.

    Attributes:
      names: canonical tensor names, in the order of the slices that they fill.
      stack: sizes of the leading axes of the leaf, of which each tensor is one slice.
      transposed: True: each tensor is `(out, in)`, the leaf `(in, out)`.
    """

    names: tuple[str, ...]
    stack: tuple[int, ...]
    transposed: bool


def canonical(name: str, prefix: str) -> str:
    """Name without the family's prefix, in today's spelling.

    Args:
      name: as stored, or a parameter path with dots.
      prefix: that a checkpoint may or may not have.

    Returns:
      The canonical name.

    Example:
      >>> canonical('bert.embeddings.LayerNorm.gamma', 'bert')
      'embeddings.LayerNorm.weight'
    """
    for old, new in OLD_SPELLINGS:
        name = re.sub(old, new, name)
    return name.removeprefix(f'{prefix}.')


def source(path: str, naming: Naming) -> Source:
    """The tensors that fill the parameter at `path`.

    Args:
      path: with slashes, e.g. `bert/encoder/layer/attention/self/query/kernel`.
      naming: of the family.

    Returns:
      Names and layout.

    Example:
      >>> naming = Naming(prefix='bert', stacks={'layer': 2})
      >>> source('bert/encoder/layer/output/dense/kernel', naming).names
      ('encoder.layer.0.output.dense.weight', 'encoder.layer.1.output.dense.weight')
    """
    *parts, leaf = path.split('/')
    pattern, stack = [], []
    for part, after in itertools.zip_longest(parts, parts[1:], fillvalue=''):
        pattern.append(part)
        if part in naming.stacks and not after.isdigit():
            pattern.append('{}')
            stack.append(naming.stacks[part])
    name = canonical('.'.join([*pattern, LEAVES[leaf]]), naming.prefix)
    names = tuple(name.format(*at) for at in itertools.product(*map(range, stack)))
    return Source(names, tuple(stack), leaf == 'kernel' and naming.transposed)


def stored_names(names: Iterable[str], naming: Naming) -> dict[str, str]:
    """Canonical name -> stored name, without the buffers.

    Args:
      names: as stored.
      naming: of the family.

    Returns:
      The table.

    Raises:
      ValueError: two stored names have one canonical form.
    """
    table: dict[str, str] = {}
    for name in names:
        if naming.buffers is not None and re.search(naming.buffers, name):
            continue
        twin = table.setdefault(canonical(name, naming.prefix), name)
        if twin != name:
            raise ValueError(
                f'a checkpoint must hold each parameter once; {twin!r} and {name!r} are the same. '
                'Remove one.'
            )
    return table
