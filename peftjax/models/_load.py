"""From a Hugging Face folder to a model and its parameters."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.models._checkpoint import Checkpoint, read_json
from peftjax.models._config import SAVED, AttentionForm, Compute, EncoderConfig, read_config
from peftjax.models._encoder import Encoder, SequenceClassifier
from peftjax.models._hub import model_folder
from peftjax.models._names import HEADS, Source, source, stored_names

Head = Literal['pooler', 'classifier', 'mean']
ShardingOf = Callable[[str], jax.sharding.Sharding | None]


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
    attention: AttentionForm = 'fused',
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
        mean of the tokens.
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
        or shapes that differ; by name.

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
    model = (
        SequenceClassifier(config, compute, head)
        if head in ('classifier', 'mean')
        else Encoder(config, compute)
    )
    shapes = parameter_shapes(model, pooled=head == 'pooler')
    checkpoint = Checkpoint(folder)
    plan = _plan(shapes, checkpoint, config, drawing=key is not None)
    params: dict[str, Any] = {}
    for path, shape in shapes.items():
        if path in plan.fresh:
            assert key is not None
            value = _draw(jax.random.fold_in(key, plan.fresh.index(path)), path, shape, config)
        else:
            value = _read(checkpoint, plan.stored, plan.sources[path], shape, dtype)
        where = sharding(path) if sharding else None
        _insert(params, path, jax.device_put(value, where, may_alias=True))
    return Loaded(model, params, config, plan.fresh, plan.unused)


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
    tree = jax.eval_shape(init, jax.random.key(0), ids)['params']
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator='/'): leaf for p, leaf in leaves}


class _Plan(NamedTuple):
    sources: dict[str, Source]
    stored: dict[str, str]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]


def _plan(
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    checkpoint: Checkpoint,
    config: EncoderConfig,
    drawing: bool,
) -> _Plan:
    """Matches parameters and tensors both ways; refuses what does not fit, by name."""
    family = config.model_type
    stored = stored_names(checkpoint, family)
    sources = {path: source(path, config.num_hidden_layers, family) for path in shapes}
    fresh = tuple(p for p in shapes if drawing and _is_drawn(p, sources, stored))
    read = {p: s for p, s in sources.items() if p not in fresh}
    unfilled = [n for s in read.values() for n in s.names if n not in stored]
    wanted = {name for s in read.values() for name in s.names}
    left = [name for name in stored if name not in wanted]
    own = {s.names[0].split('.', 1)[0] for s in read.values()}
    refused = [n for n in left if n.split('.', 1)[0] not in HEADS or n.split('.', 1)[0] in own]
    if unfilled or refused:
        raise ValueError(
            f'cannot load {family} from {checkpoint.folder}: every parameter must be filled and '
            f'every tensor used. {len(unfilled)} parameters were not filled{_some(unfilled)}, '
            f'{len(refused)} tensors were not used{_some([stored[n] for n in refused])}. '
            'A missing head is drawn when key=... is given; else config.json and weights '
            'belong to different models.'
        )
    for path, origin in read.items():
        _check_shape(path, shapes[path].shape, origin, checkpoint, stored)
    return _Plan(read, stored, fresh, tuple(stored[n] for n in left))


def _is_drawn(path: str, sources: Mapping[str, Source], stored: Mapping[str, str]) -> bool:
    """True for the classifier, and for a pooler of which the checkpoint holds nothing."""
    part = sources[path].names[0].split('.', 1)[0]
    return part == 'classifier' or (
        part == 'pooler' and not any(name.startswith('pooler.') for name in stored)
    )


def _some(names: list[str]) -> str:
    return f' ({", ".join(names[:5])}{", …" if len(names) > 5 else ""})' if names else ''


def _check_shape(
    path: str,
    shape: tuple[int, ...],
    origin: Source,
    checkpoint: Checkpoint,
    stored: Mapping[str, str],
) -> None:
    expected = shape[1:] if origin.stacked else shape
    expected = expected[::-1] if origin.transposed else expected
    for name in origin.names:
        received = checkpoint.shape(stored[name])
        if received != expected:
            raise ValueError(
                f'{path} needs {stored[name]!r} of shape {expected}, the checkpoint has '
                f'{received}. config.json and weights must agree; a classifier of another width '
                'is drawn when key=... is given.'
            )


def _read(
    checkpoint: Checkpoint,
    stored: Mapping[str, str],
    origin: Source,
    shape: jax.ShapeDtypeStruct,
    dtype: jax.typing.DTypeLike,
) -> np.ndarray:
    """Fills one parameter, tensor by tensor."""
    value = _aligned(shape.shape, np.dtype(dtype))
    for slot, name in zip(value if origin.stacked else [value], origin.names, strict=True):
        tensor = checkpoint[stored[name]]
        np.copyto(slot, tensor.T if origin.transposed else tensor, casting='unsafe')
    return value


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that starts on a cache line: a CPU device takes it over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _draw(
    key: jax.Array, path: str, shape: jax.ShapeDtypeStruct, config: EncoderConfig
) -> jax.Array:
    """A fresh head's leaf, as Hugging Face draws it."""
    if path.endswith('/kernel'):
        draw = jax.random.normal(key, shape.shape, jnp.float32) * config.initializer_range
        return draw.astype(shape.dtype)
    return jnp.zeros(shape.shape, shape.dtype)


def _insert(tree: dict[str, Any], path: str, value: jax.Array) -> None:
    *parents, leaf = path.split('/')
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = value
