"""Where the parameters of a decoder lie on a mesh."""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from peftjax.models._compute import Compute
from peftjax.models._decoder import Decoder
from peftjax.models._decoder_config import DecoderConfig
from peftjax.models._fill import ShardingOf
from peftjax.models._load_decoder import decoder_shapes

AXES = ('data', 'fsdp', 'model')
"""Axes of a mesh that mean something. `data` splits batches. `model` splits each product. `fsdp`
splits batches, and keeps a part of each weight, which is gathered where it is used."""


def decoder_sharding(config: DecoderConfig, mesh: Mesh, *, scan_layers: bool = True) -> ShardingOf:
    """Places the weights of a decoder on a mesh, for `load_decoder(..., sharding=...)`.

    Products into heads and into the inner width are split by what they produce, those back by what
    they sum over, so that one sum over devices ends each; the head by its vocabulary, the embedding
    by its rows. Along `fsdp` each is split by its other dimension. Norms, biases, and what an axis
    does not divide lie whole on every device.

    Args:
      config: of the decoder.
      mesh: with axes among `data`, `fsdp` and `model`.
      scan_layers: as of `load_decoder`.

    Returns:
      From a parameter's path to where it lives.

    Raises:
      ValueError: an axis of another name.

    Example:
      >>> from peftjax.models import read_decoder_config
      >>> config = read_decoder_config({'model_type': 'llama', 'vocab_size': 64, 'hidden_size': 16,
      ...     'num_hidden_layers': 2, 'num_attention_heads': 4, 'intermediate_size': 24})
      >>> where = decoder_sharding(config, jax.make_mesh((1,), ('model',)))
      >>> tuple(where('model/layers/mlp/down_proj/kernel').spec)
      (None, 'model', None)

    Reference: Shoeybi et al., Megatron-LM, 2019, arXiv:1909.08053, section 3.
    """
    unknown = [axis for axis in mesh.axis_names if axis not in AXES]
    if unknown:
        raise ValueError(f'the axes of the mesh must be among {AXES}, got {unknown[0]!r}.')
    shapes = decoder_shapes(Decoder(config, Compute(scan_layers=scan_layers)))
    names = config.names
    back = {(names.attention, names.output), (names.mlp, names.down), (names.experts, names.down)}

    def where(path: str) -> jax.sharding.Sharding:
        *_, above, module, leaf = ('', '', *path.split('/'))
        shape = shapes[path].shape
        by_rows = leaf == 'embedding' or (above, module) in back
        axes = ('model', 'fsdp') if by_rows else ('fsdp', 'model')
        spec: list[str | None] = [None] * len(shape)
        if leaf in ('kernel', 'embedding'):
            spec[-2:] = [_dividing(a, n, mesh) for a, n in zip(axes, shape[-2:], strict=True)]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return where


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the rows of a batch over the axes `data` and `fsdp`.

    Args:
      mesh: as of `decoder_sharding`.

    Returns:
      The sharding of arrays `(batch, ...)`, whole on every device where the mesh has neither axis.
      Placing an array on it fails where the axes do not divide its rows.

    Example:
      >>> batch_sharding(jax.make_mesh((1, 1), ('data', 'model'))).spec[0]
      'data'
    """
    axes = tuple(axis for axis in ('data', 'fsdp') if axis in mesh.axis_names)
    return NamedSharding(mesh, PartitionSpec(axes or None))


def _dividing(axis: str, size: int, mesh: Mesh) -> str | None:
    return axis if axis in mesh.axis_names and not size % mesh.shape[axis] else None
