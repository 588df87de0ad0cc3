"""A few-shot task: an encoder, labeled examples, and the loss between them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from peftjax import _processes, data, models
from peftjax.losses import Loss
from peftjax.models._checkpoint import read_json

EVALUATE = 64
"""Rows of a batch where nothing is trained."""

HEAD_KEY = 0
"""Draws theta's classifier, the same in every run, so that theta stays recognizable; training
starts from `Task.fresh`, which each seed draws anew."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What every method gets alike.

    Attributes:
      model: what was asked for: a folder or hub name, empty for the default model.
      params: theta, with a fresh classifier.
      apply: `apply(params, ids, attention_mask=…, pool_mask=…, deterministic=…, rngs=…)`.
      features: `features(params, batch)`, the mean hidden state of each row, frozen.
      names: of the labels.
      tokenizer: of the model.
      pad_id: of the model.
      max_tokens: longer texts are cut.
      deviation: of the weights of a fresh classifier.
      mesh: of the devices that compute; None for one device.
    """

    model: str
    params: Any
    apply: Callable[..., jax.Array]
    features: Callable[[Any, dict], jax.Array]
    names: tuple[str, ...]
    tokenizer: Any
    pad_id: int
    max_tokens: int
    deviation: float
    mesh: Mesh | None = None

    def fresh(self, key: jax.Array) -> Any:
        """Theta with a classifier of its own; its luck is a part of the spread over seeds."""
        head = self.params['classifier']
        kernel = self.deviation * jax.random.normal(key, head['kernel'].shape)
        drawn = {'kernel': kernel, 'bias': jnp.zeros_like(head['bias'])}
        return {**self.params, 'classifier': drawn}

    def encode(self, texts: tuple[str, ...]) -> data.Tokens:
        """Tokens of texts."""
        return data.encode(self.tokenizer, texts, self.max_tokens, pad_id=self.pad_id)

    def batch(self, tokens: data.Tokens, labels: np.ndarray, index: np.ndarray, size: int) -> dict:
        """The arrays of one step, of one of a few lengths: few programs serve all batches."""
        taken = data.take(tokens, index, size)
        return {
            'ids': taken.input_ids,
            'mask': taken.attention_mask,
            'weights': taken.weights,
            'labels': labels[taken.index],
        }

    def each(self, program: Callable[[dict], Any], tokens: data.Tokens) -> np.ndarray:
        """What a program gives for each example, `(n, …)`; texts of like length share a batch."""
        order = np.argsort(tokens.attention_mask.sum(1), kind='stable')
        none, found = np.zeros(len(order), np.int32), []
        for index in data.in_order(len(order), EVALUATE):
            batch = self.batch(tokens, none, order[index], EVALUATE)
            found.append(_processes.whole(program(batch))[: len(index)])
        return np.concatenate(found)[np.argsort(order)]


def load_task(
    model: str, names: tuple[str, ...], max_tokens: int, mesh: Mesh | None = None
) -> Task:
    """Loads an encoder and puts a classifier on it.

    Args:
      model: folder or hub name; empty for the default model.
      names: of the labels.
      max_tokens: longer texts are cut.
      mesh: over which its weights are spread.

    Returns:
      The task.
    """
    folder = model or models.default_model_path()
    how = {} if mesh is None else {'sharding': _sharding(folder, len(names), mesh)}
    key = jax.random.key(HEAD_KEY)
    loaded = models.load_encoder(folder, 'mean', num_labels=len(names), key=key, **how)
    tokenizer = models.load_tokenizer(folder)
    config = loaded.config
    encoder = models.Encoder(config, loaded.model.compute)

    def features(params: Any, batch: dict) -> jax.Array:
        hidden = encoder.apply_fn(params[config.model_type], batch['ids'], batch['mask'])
        return models.mean_pool(hidden, batch['mask'])

    return Task(
        model,
        loaded.params,
        loaded.model.apply_fn,
        features,
        names,
        tokenizer,
        config.pad_token_id,
        max_tokens,
        config.initializer_range,
        mesh,
    )


def _sharding(model: str, labels: int, mesh: Mesh) -> Any:
    config = models.read_config(read_json(models.model_folder(model) / 'config.json'))
    config = dataclasses.replace(config, num_labels=labels)
    return models.encoder_sharding(config, mesh, head='mean')


def call(task: Task, forward: Callable[..., jax.Array], batch: dict, key: Any, *trees: Any) -> Any:
    """Logits of a batch; a key switches the model's dropout on."""
    how = {'deterministic': True} if key is None else {
        'deterministic': False, 'rngs': {'dropout': key}, 'dropout_key': key}  # fmt: skip
    mask = batch['mask']
    return forward(*trees, batch['ids'], attention_mask=mask, pool_mask=mask, **how)


def cross_entropy(logits: jax.Array, batch: dict) -> Loss:
    """The loss over the real rows of a batch."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), batch['labels']
    )
    return Loss((losses * batch['weights']).sum(), batch['weights'].sum())
