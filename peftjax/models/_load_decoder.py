"""From a Hugging Face folder to a decoder and its parameters."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from peftjax import _paths
from peftjax._quantized import Scheme
from peftjax._types import Target
from peftjax.models import _quantized_folder
from peftjax.models._checkpoint import Checkpoint, read_json
from peftjax.models._compute import AttentionForm, Compute
from peftjax.models._decoder import Decoder
from peftjax.models._decoder_block import KEPT
from peftjax.models._decoder_config import DecoderConfig
from peftjax.models._families import read_decoder_config
from peftjax.models._fill import ShardingOf, as_stored, by_path, fill, insert, match
from peftjax.models._hub import model_folder
from peftjax.models._linears import linears
from peftjax.models._names import Naming
from peftjax.models._rounding import rounded

Remat = Literal['none', 'full', 'names']
_SAVE: dict[Remat, tuple[str, ...] | None] = {'none': None, 'full': (), 'names': KEPT}


class LoadedDecoder(NamedTuple):
    """A decoder with its parameters; `model.apply_fn(params, input_ids, ...)` runs it.

    Attributes:
      model: the module.
      params: nested dicts of arrays, the tree under linen's `'params'`.
      config: what the checkpoint says of itself.
    """

    model: Decoder
    params: dict[str, Any]
    config: DecoderConfig


def load_decoder(
    path_or_hub_name: str,
    *,
    scan_layers: bool = True,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: Remat = 'names',
    attention: AttentionForm = 'auto',
    sharding: ShardingOf | None = None,
    scheme: Scheme | None = None,
    target: Target | None = None,
) -> LoadedDecoder:
    """Loads a decoder language model from a Hugging Face folder or hub name.

    Tensors are read one at a time, cast, and written into the parameter they belong to; where a
    parameter is sharded, each device's part alone is read. No more is held than the model and one
    tensor.

    With a `scheme` chosen parameters are rounded while they are read, a part of a layer at a time:
    `pj.quantize` of the loaded parameters gives the same, but holds all of them dense before. A
    folder that `quantize_decoder` wrote holds quantized leaves already. Both are for `Peft.wrap`,
    or `pj.quantized_apply(model.apply_fn)`.

    Args:
      path_or_hub_name: a folder with config.json and safetensors, or `owner/name` on the hub.
      scan_layers: as in `Compute`.
      dtype: of parameters and computation; logits are float32.
      remat: what a gradient keeps of each layer: `'none'` computes nothing again; `'full'`
        everything but the layer's input; `'names'` keeps the results of products and attention
        that are dear to compute again (`query`, `key`, `value`, `context`, `attention_residual`,
        `gate`, `up`).
      attention: as in `Compute`.
      sharding: from a parameter's path to where it lives; None is the default device.
      scheme: such as `pj.NF4`; None leaves the parameters as they are stored.
      target: with a scheme, regex, or several, searched in the paths of parameters; None is all
        linear layers (`linears`), and neither embedding nor head (`embeddings`).

    Returns:
      Model, parameters, configuration.

    Raises:
      FileNotFoundError: no such folder, or files missing from it.
      ConnectionError: the hub does not give the model.
      ValueError: an unsupported config, a damaged file, tensors left over, parameters not filled,
        or shapes that differ; by name. A scheme for a folder that is quantized, a target without
        a scheme, or a pattern that finds nothing. `CheckpointError`, where files of a quantized
        folder are damaged.

    Example:
      >>> llama = load_decoder('owner/model', dtype=jnp.bfloat16)  # doctest: +SKIP
      >>> logits = llama.model.apply_fn(llama.params, input_ids, mask)  # doctest: +SKIP
    """
    compute = Compute(
        scan_layers=scan_layers,
        dtype=dtype,
        param_dtype=dtype,
        attention=attention,
        save=saved_names(remat),
    )
    folder = model_folder(path_or_hub_name)
    config = read_decoder_config(read_json(folder / 'config.json'))
    model = Decoder(config, compute)
    shapes = decoder_shapes(model)
    chosen = _chosen(folder, config, shapes, scheme, target)
    if is_quantized(folder):
        return LoadedDecoder(model, _quantized_folder.read(folder, shapes, sharding), config)
    plan = match(shapes, Checkpoint(folder), decoder_naming(config))
    dense = {path: shape for path, shape in shapes.items() if path not in chosen}
    params = fill(dense, plan, sharding)
    for path, how in chosen.items():
        leaf = rounded(plan, path, shapes[path], how)
        insert(params, path, _quantized_folder.put(leaf, sharding(path) if sharding else None))
    return LoadedDecoder(model, params, config)


def abstract_decoder(
    path_or_hub_name: str, *, dtype: jax.typing.DTypeLike | None = None
) -> LoadedDecoder:
    """What `load_decoder` would give, in shapes: of the weights only the headers are read.

    Args:
      path_or_hub_name: as of `load_decoder`.
      dtype: of parameters and computation; None is that of the token embedding as it is stored.

    Returns:
      Model, parameters as `jax.ShapeDtypeStruct`s (a quantized leaf as a `pj.Quantized` of them),
      configuration.

    Raises:
      FileNotFoundError: as `load_decoder`.
      ConnectionError: as `load_decoder`.
      ValueError: as `load_decoder`; but bytes that were changed are not noticed.

    Example:
      >>> llama = abstract_decoder('owner/model')  # doctest: +SKIP
      >>> print(pj.sites(llama.model.apply_fn, llama.params, input_ids))  # doctest: +SKIP
    """
    folder = model_folder(path_or_hub_name)
    config = read_decoder_config(read_json(folder / 'config.json'))
    stored = _as_stored(folder, config)
    table = stored[f'{config.names.body}/{config.names.embedding}/embedding']
    dtype = jnp.dtype(table.dtype if dtype is None else dtype)
    model = Decoder(config, Compute(dtype=dtype, param_dtype=dtype))
    shapes: dict[str, Any] = decoder_shapes(model)
    if is_quantized(folder):
        shapes = _quantized_folder.abstract(folder, shapes)
    params: dict[str, Any] = {}
    for path, shape in shapes.items():
        insert(params, path, shape)
    return LoadedDecoder(model, params, config)


def is_quantized(path_or_hub_name: str | os.PathLike[str]) -> bool:
    """Tells a folder that `quantize_decoder` wrote from one of Hugging Face.

    Args:
      path_or_hub_name: as of `load_decoder`.

    Returns:
      Whether its parameters are quantized.

    Raises:
      FileNotFoundError: no such folder.
      ConnectionError: the hub does not give the model.

    Example:
      >>> is_quantized('.')
      False
    """
    return (model_folder(path_or_hub_name) / _quantized_folder.ABOUT).is_file()


def refuse_quantized(folder: pathlib.Path) -> None:
    """Refuses to round again what is rounded.

    Args:
      folder: of a model.

    Raises:
      ValueError: its parameters are quantized.
    """
    if is_quantized(folder):
        raise ValueError(
            f'{folder} is quantized already. Take it as it is, or the model that it was made of.'
        )


def _as_stored(folder: pathlib.Path, config: DecoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the parameters, not quantized, in the dtypes that the folder has them in."""
    shapes = decoder_shapes(Decoder(config))
    if is_quantized(folder):
        return _quantized_folder.as_stored(folder, shapes)
    return as_stored(shapes, match(shapes, Checkpoint(folder), decoder_naming(config)))


def _chosen(
    folder: pathlib.Path,
    config: DecoderConfig,
    shapes: Mapping[str, Any],
    scheme: Scheme | None,
    target: Target | None,
) -> dict[str, Scheme]:
    """How the parameters are rounded that are to be."""
    if scheme is None and target is not None:
        raise ValueError(f'a target needs a scheme, such as pj.NF4; got target={target!r} alone.')
    if scheme is None:
        return {}
    refuse_quantized(folder)
    found = _paths.selected(linears(config) if target is None else target, shapes)
    return dict.fromkeys(found, scheme)


def decoder_config(path_or_hub_name: str) -> DecoderConfig:
    """Reads the configuration of a decoder's folder, and nothing else of it.

    Args:
      path_or_hub_name: as of `load_decoder`.

    Returns:
      The configuration.

    Raises:
      FileNotFoundError: no such folder, or no config.json in it.
      ConnectionError: the hub does not give the model.
      ValueError: an unsupported config.

    Example:
      >>> decoder_config('owner/model').num_hidden_layers  # doctest: +SKIP
      32
    """
    return read_decoder_config(read_json(model_folder(path_or_hub_name) / 'config.json'))


def saved_names(remat: Remat) -> tuple[str, ...] | None:
    """What `Compute.save` is for a policy.

    Args:
      remat: as of `load_decoder`.

    Returns:
      Names, or None.

    Raises:
      ValueError: an unknown policy.

    Example:
      >>> saved_names('full')
      ()
    """
    if remat not in _SAVE:
        raise ValueError(f'remat must be one of {get_args(Remat)}, got {remat!r}.')
    return _SAVE[remat]


def decoder_shapes(model: Decoder) -> dict[str, jax.ShapeDtypeStruct]:
    """Paths, shapes and dtypes of a decoder's parameters, without computing anything.

    Args:
      model: a decoder.

    Returns:
      `{path: ShapeDtypeStruct}` in the order of the tree.
    """
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return by_path(jax.eval_shape(model.init, jax.random.key(0), ids)['params'])


def decoder_naming(config: DecoderConfig) -> Naming:
    """How the tensors of a decoder's checkpoint are named.

    Args:
      config: of the decoder.

    Returns:
      The naming.
    """
    names = config.names
    twins = {f'{names.head}.weight': f'{names.embedding}.weight'} if config.tied else {}
    return Naming(
        prefix=names.body,
        stacks={names.layers: config.num_hidden_layers, names.experts: config.mlp.experts},
        # GPT-2 keeps the linear layers of its blocks as they are multiplied.
        transposed=config.names.body != 'transformer',
        buffers=r'(\.attn\.(masked_)?bias|rotary_emb\.inv_freq)$',
        twins=twins,
    )
