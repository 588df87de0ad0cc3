"""Which tensors of a Hugging Face checkpoint fill which parameter.

The rule is one table: a parameter's path with dots for slashes is the tensor's name, and the last
part translates by `LEAVES`. Old spellings and prefixes are brought to one form before.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

LEAVES = {'kernel': 'weight', 'scale': 'weight', 'embedding': 'weight', 'bias': 'bias'}
"""Flax leaf name -> PyTorch parameter name. A `kernel` is stored transposed."""

OLD_SPELLINGS = ((r'\.gamma$', '.weight'), (r'\.beta$', '.bias'))
"""Names of TensorFlow's BERT, still found in old checkpoints."""

BUFFERS = r'embeddings\.(position_ids|token_type_ids)$'
"""Tensors that are constants of the model, not parameters."""

HEADS = ('pooler', 'classifier', 'cls', 'lm_head', 'qa_outputs')
"""First part of the names that a target without that head may leave unused."""

_STACK = 'encoder/layer/'


class Source(NamedTuple):
    """Where one parameter comes from.

    Attributes:
      names: canonical tensor names, one per stacked layer.
      stacked: True: the tensors are the slices of the leaf along its first axis.
      transposed: True: each tensor is `(out, in)`, the leaf `(in, out)`.
    """

    names: tuple[str, ...]
    stacked: bool
    transposed: bool


def canonical(name: str, model_type: str) -> str:
    """Name without the family's prefix, in today's spelling.

    Args:
      name: as stored, or a parameter path with dots.
      model_type: the prefix that a checkpoint may or may not have.

    Returns:
      The canonical name.

    Example:
      >>> canonical('bert.embeddings.LayerNorm.gamma', 'bert')
      'embeddings.LayerNorm.weight'
    """
    for old, new in OLD_SPELLINGS:
        name = re.sub(old, new, name)
    return name.removeprefix(f'{model_type}.')


def source(path: str, length: int, model_type: str) -> Source:
    """The tensors that fill the parameter at `path`.

    Args:
      path: with slashes, e.g. `bert/encoder/layer/attention/self/query/kernel`.
      length: number of layers, where layers are scanned.
      model_type: prefix to drop.

    Returns:
      Names and layout.

    Example:
      >>> source('bert/encoder/layer/output/dense/kernel', 2, 'bert').names
      ('encoder.layer.0.output.dense.weight', 'encoder.layer.1.output.dense.weight')
    """
    parent, leaf = path.rsplit('/', 1)
    name = canonical(f'{parent}/{LEAVES[leaf]}'.replace('/', '.'), model_type)
    start, stack, rest = name.partition(_STACK.replace('/', '.'))
    stacked = bool(stack) and not rest.split('.', 1)[0].isdigit()
    names = tuple(f'{start}{stack}{i}.{rest}' for i in range(length)) if stacked else (name,)
    return Source(names, stacked, leaf == 'kernel')


def stored_names(names: Iterable[str], model_type: str) -> dict[str, str]:
    """Canonical name -> stored name, without the buffers.

    Args:
      names: as stored.
      model_type: prefix to drop.

    Returns:
      The table.

    Raises:
      ValueError: two stored names have one canonical form.
    """
    table: dict[str, str] = {}
    for name in names:
        if re.search(BUFFERS, name):
            continue
        twin = table.setdefault(canonical(name, model_type), name)
        if twin != name:
            raise ValueError(
                f'a checkpoint must hold each parameter once; {twin!r} and {name!r} are the same. '
                'Remove one.'
            )
    return table
