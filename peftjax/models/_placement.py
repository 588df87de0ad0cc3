"""Where the parameters of the models lie on a mesh."""

from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from peftjax._mesh_axes import AXES
from peftjax._rules import Rule, parts, spec_of
from peftjax.models._compute import Compute
from peftjax.models._config import EncoderConfig
from peftjax.models._decoder import Decoder
from peftjax.models._decoder_config import DecoderConfig
from peftjax.models._fill import ShardingOf
from peftjax.models._load import Head, encoder_model, parameter_shapes
from peftjax.models._load_decoder import decoder_shapes

BY_ROWS = P(('model', 'fsdp'), None)
BY_INPUTS, BY_OUTPUTS = P('model', 'fsdp'), P('fsdp', 'model')


def decoder_rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """How the leaves of a decoder are split over the axes `fsdp` and `model`.

    Products into heads and into the inner width are split by what they produce, those back by what
    they sum over, so that one sum over devices ends each; the head by its vocabulary. Along
    `fsdp` each is split by its other dimension. The embedding is split by its rows, along both.

    Args:
      config: of the decoder.

    Returns:
      `((pattern, spec of the last two axes), …)`; the first that finds a path counts, what none
      finds is not split.

    Example:
      >>> from peftjax.models import read_decoder_config
      >>> config = read_decoder_config({'model_type': 'llama', 'vocab_size': 64, 'hidden_size': 16,
      ...     'num_hidden_layers': 2, 'num_attention_heads': 4, 'intermediate_size': 24})
      >>> for pattern, spec in decoder_rules(config):
      ...     print(pattern, tuple(spec))
      /embedding$ (('model', 'fsdp'), None)
      /(self_attn/o_proj|mlp/down_proj|experts/down_proj)/kernel$ ('model', 'fsdp')
      /kernel$ ('fsdp', 'model')

    Reference: Shoeybi et al., Megatron-LM, 2019, arXiv:1909.08053, section 3; Zhao et al., PyTorch
    FSDP, 2023, arXiv:2304.11277.
    """
    names = config.names
    back = (
        f'{names.attention}/{names.output}', f'{names.mlp}/{names.down}',
        f'{names.experts}/{names.down}',
    )  # fmt: skip
    return _split(f'({"|".join(back)})')


def encoder_rules(config: EncoderConfig) -> tuple[Rule, ...]:
    """How the leaves of an encoder are split over the axes `fsdp` and `model`.

    Args:
      config: of the encoder.

    Returns:
      As of `decoder_rules`.

    Example:
      >>> from peftjax.models import EncoderConfig
      >>> config = EncoderConfig(model_type='bert', vocab_size=64, hidden_size=16,
      ...     num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
      >>> for pattern, spec in encoder_rules(config):
      ...     print(pattern, tuple(spec))
      /embedding$ (('model', 'fsdp'), None)
      /output/dense/kernel$ ('model', 'fsdp')
      /kernel$ ('fsdp', 'model')

    Reference: as of `decoder_rules`.
    """
    del config  # both families name their modules alike
    return _split('output/dense')


def decoder_sharding(config: DecoderConfig, mesh: Mesh, *, scan_layers: bool = True) -> ShardingOf:
    """Places the weights of a decoder on a mesh, for `load_decoder(..., sharding=...)`.

    The axes of the mesh choose: `data` alone is data parallelism, every weight whole on every
    device; `fsdp` keeps parts of them; `model` is tensor parallelism; they combine. What an axis
    does not divide is not split by it, nor are norms and biases.

    Compute under `jax.set_mesh(mesh)`: activations then stay split by rows, without which `fsdp`
    computes all rows on every device. Where the axes of the mesh are explicit, a loss of the model
    runs as `jax.sharding.auto_axes(loss, out_sharding=PartitionSpec())`.

    Args:
      config: of the decoder.
      mesh: with axes among `data`, `fsdp` and `model`.
      scan_layers: as of `load_decoder`.

    Returns:
      From a parameter's path to where it lives, as `decoder_rules` says.

    Raises:
      ValueError: an axis of another name.

    Example:
      >>> from peftjax.models import read_decoder_config
      >>> config = read_decoder_config({'model_type': 'llama', 'vocab_size': 64, 'hidden_size': 16,
      ...     'num_hidden_layers': 2, 'num_attention_heads': 4, 'intermediate_size': 24})
      >>> where = decoder_sharding(config, jax.make_mesh((1,), ('model',)))
      >>> tuple(where('model/layers/mlp/down_proj/kernel').spec)
      (None, 'model', None)
    """
    shapes = decoder_shapes(Decoder(config, Compute(scan_layers=scan_layers)))
    return _sharding(decoder_rules(config), shapes, mesh)


def encoder_sharding(
    config: EncoderConfig, mesh: Mesh, *, head: Head | None = None, scan_layers: bool = True
) -> ShardingOf:
    """Places the weights of an encoder on a mesh, for `load_encoder(..., sharding=...)`.

    Args:
      config: of the encoder, with the number of labels of its classifier.
      mesh: as of `decoder_sharding`.
      head: as of `load_encoder`.
      scan_layers: as of `load_encoder`.

    Returns:
      From a parameter's path to where it lives, as `encoder_rules` says.

    Raises:
      ValueError: an axis of another name.

    Example:
      >>> from peftjax.models import EncoderConfig
      >>> config = EncoderConfig(model_type='bert', vocab_size=64, hidden_size=16,
      ...     num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
      >>> where = encoder_sharding(config, jax.make_mesh((1,), ('model',)))
      >>> tuple(where('encoder/layer/output/dense/kernel').spec)
      (None, 'model', None)
    """
    model = encoder_model(config, Compute(scan_layers=scan_layers), head)
    shapes = parameter_shapes(model, pooled=head == 'pooler')
    return _sharding(encoder_rules(config), shapes, mesh)


def _split(back: str) -> tuple[Rule, ...]:
    """Rules of a model whose products of these names lead back into the residual stream."""
    modules = (f'/{back}/kernel$', BY_INPUTS), ('/kernel$', BY_OUTPUTS)
    return (('/embedding$', BY_ROWS), *modules)


def _sharding(
    rules: Sequence[Rule], shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh
) -> ShardingOf:
    unknown = [axis for axis in mesh.axis_names if axis not in AXES]
    if unknown:
        raise ValueError(f'the axes of the mesh must be among {AXES}, got {unknown[0]!r}.')

    def fitting(entry: str | tuple[str, ...] | None, size: int) -> str | tuple[str, ...] | None:
        names = (entry,) if isinstance(entry, str) else entry or ()
        names = tuple(name for name in names if name in mesh.axis_names)
        while names and size % parts(names, mesh):
            names = names[:-1]
        return names if len(names) > 1 else next(iter(names), None)

    def where(path: str) -> NamedSharding:
        shape = shapes[path].shape
        spec = spec_of(rules, path, shape)
        return NamedSharding(mesh, P(*map(fitting, spec, shape)))

    return where
