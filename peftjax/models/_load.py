"""From a Hugging Face folder to a model and its parameters."""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from peftjax.models._checkpoint import Checkpoint, read_json
from peftjax.models._compute import SAVED, AttentionForm, Compute
from peftjax.models._config import EncoderConfig, read_config
from peftjax.models._encoder import Encoder, SequenceClassifier
from peftjax.models._fill import ShardingOf, by_path, fill, match
from peftjax.models._hub import model_folder
from peftjax.models._names import Naming, source

Head = Literal['pooler', 'classifier', 'mean']


class Loaded(NamedTuple):
    """A model with its parameters; `model.apply_fn(params, input_ids, ...)` runs it.

    Attributes:
      model: `Encoder` or `SequenceClassifier`.
      params: nested dicts of arrays, the tree under linen's `'params'`.
      config: the checkpoint's shape.
      fresh: paths of the parameters that were drawn from `key`; empty where all were loaded.
      unused: stored names of the tensors of heads that this model does not have.
    """

    model: Encoder | SequenceClassifier
    params: dict[str, Any]
    config: EncoderConfig
    fresh: tuple[str, ...]
    unused: tuple[str, ...]


def load_encoder(
    path_or_hub_name: str,
    head: Head | None = None,
    *,
    num_labels: int | None = None,
    key: jax.Array | None = None,
    scan_layers: bool = True,
    dtype: jax.typing.DTypeLike = jnp.float32,
    attention: AttentionForm = 'auto',
    save: tuple[str, ...] | None = SAVED,
    sharding: ShardingOf | None = None,
) -> Loaded:
    """Loads a BERT or RoBERTa encoder from a Hugging Face folder or hub name.

    Tensors are read one at a time and written into the parameter they belong to, so that no more
    than the model and one tensor are held.

    Args:
      path_or_hub_name: a folder with config.json and safetensors, or `owner/name` on the hub.
      head: None is the encoder; `'pooler'` the encoder with its pooler (`method='pooled'`);
        `'classifier'` the family's sequence classifier; `'mean'` a linear classifier over the
        mean of the tokens, which does not take the weights of one that was trained on a pooler.
      num_labels: width of the classifier. Default: the config's.
      key: draws the classifier anew, whatever the checkpoint holds, and BERT's pooler where the
        checkpoint has none. Without it every parameter must be in the checkpoint.
      scan_layers: as in `Compute`.
      dtype: of parameters and computation.
      attention: as in `Compute`.
      save: as in `Compute`.
      sharding: from a parameter's path to where it lives; None is the default device.

    Returns:
      Model, parameters and what was drawn or left unused.

    Raises:
      FileNotFoundError: no such folder, or files missing from it.
      ConnectionError: the hub does not give the model.
      ValueError: an unsupported config, a damaged file, tensors left over, parameters not filled,
        or shapes that differ; by name. For `'mean'` without a key, a classifier that stands on a
        pooler.

    Example:
      >>> bert = load_encoder(default_model_path(), 'mean', num_labels=6,
      ...                     key=jax.random.key(0))  # doctest: +SKIP
      >>> logits = bert.model.apply_fn(bert.params, input_ids, mask)  # doctest: +SKIP
      >>> bert.fresh  # doctest: +SKIP
      ('classifier/bias', 'classifier/kernel')
    """
    if head not in (None, 'pooler', 'classifier', 'mean'):
        raise ValueError(f"head must be None, 'pooler', 'classifier' or 'mean', got {head!r}.")
    folder = model_folder(path_or_hub_name)
    config = read_config(read_json(folder / 'config.json'))
    if num_labels is not None:
        config = dataclasses.replace(config, num_labels=num_labels)
    compute = Compute(
        scan_layers=scan_layers, dtype=dtype, param_dtype=dtype, attention=attention, save=save
    )
    model = encoder_model(config, compute, head)
    shapes = parameter_shapes(model, pooled=head == 'pooler')
    naming = encoder_naming(config)

    def fresh(stored: Mapping[str, str]) -> tuple[str, ...]:
        if key is not None:
            return _drawn(shapes, naming, stored)
        if head == 'mean':
            _check_mean(stored, folder)
        return ()

    plan = match(
        shapes,
        Checkpoint(folder),
        naming,
        fresh=fresh,
        hint='A missing head is drawn when key=... is given; else config.json and weights belong '
        'to different models.',
    )

    def draw(path: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        assert key is not None
        return _draw(jax.random.fold_in(key, plan.fresh.index(path)), path, shape, config)

    params = fill(shapes, plan, sharding, draw)
    return Loaded(model, params, config, plan.fresh, plan.unused)


def encoder_model(
    config: EncoderConfig, compute: Compute, head: Head | None
) -> Encoder | SequenceClassifier:
    """The module that `load_encoder` fills.

    Args:
      config: of the encoder.
      compute: how it computes.
      head: as of `load_encoder`.

    Returns:
      The encoder, or a classifier over it.
    """
    if head in ('classifier', 'mean'):
        return SequenceClassifier(config, compute, head)
    return Encoder(config, compute)


def parameter_shapes(
    model: Encoder | SequenceClassifier, *, pooled: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """Paths, shapes and dtypes of a model's parameters, without computing anything.

    Args:
      model: an encoder or a classifier.
      pooled: of an encoder: with its pooler.

    Returns:
      `{path: ShapeDtypeStruct}` in the order of the tree.
    """
    method = 'pooled' if pooled else '__call__'
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    init = lambda key, ids: model.init(key, ids, method=method)
    return by_path(jax.eval_shape(init, jax.random.key(0), ids)['params'])


def encoder_naming(config: EncoderConfig) -> Naming:
    """How the tensors of BERT's and RoBERTa's checkpoints are named.

    Args:
      config: family and number of layers.

    Returns:
      The naming.
    """
    return Naming(
        prefix=config.model_type,
        stacks={'layer': config.num_hidden_layers},
        heads=('pooler', 'classifier', 'cls', 'lm_head', 'qa_outputs'),
        buffers=r'embeddings\.(position_ids|token_type_ids)$',
    )


def _drawn(paths: Iterable[str], naming: Naming, stored: Mapping[str, str]) -> tuple[str, ...]:
    """Those of the classifier, and of a pooler of which the checkpoint holds nothing."""
    has_pooler = any(name.startswith('pooler.') for name in stored)
    heads = ('classifier',) if has_pooler else ('classifier', 'pooler')
    part = lambda path: source(path, naming).names[0].split('.', 1)[0]
    return tuple(path for path in paths if part(path) in heads)


def _check_mean(stored: Mapping[str, str], folder: pathlib.Path) -> None:
    """Refuses a classifier that was trained on something else than the mean of the tokens."""
    under = [n for name, n in stored.items() if name.startswith(('pooler.', 'classifier.dense.'))]
    if under and any(name.startswith('classifier.') for name in stored):
        raise ValueError(
            f"a classifier over the mean of the tokens (head='mean') must be one: that of {folder} "
            f"stands on {under[0]!r}. Draw another with key=..., or load it with head='classifier'."
        )


def _draw(
    key: jax.Array, path: str, shape: jax.ShapeDtypeStruct, config: EncoderConfig
) -> jax.Array:
    """A fresh head's leaf, as Hugging Face draws it."""
    if path.endswith('/kernel'):
        draw = jax.random.normal(key, shape.shape, jnp.float32) * config.initializer_range
        return draw.astype(shape.dtype)
    return jnp.zeros(shape.shape, shape.dtype)
