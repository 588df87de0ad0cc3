"""A language model as the commands use it: decoder, tokenizer, loss."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import peftjax as pj
from peftjax import data, losses, models
from peftjax._types import Target
from peftjax.data import LanguageBatch

SCHEMES = {'nf4': pj.NF4, 'int4': pj.INT4, 'int8': pj.INT8}


@dataclasses.dataclass(frozen=True)
class Task:
    """What every method gets alike.

    Attributes:
      model: what was asked for: a folder or hub name.
      decoder: the model.
      params: theta, in part quantized where that was asked for.
      tokenizer: of transformers.
      stop: the tokens that end a text.
      pad_id: the token at padding.
      mesh: of the devices that compute; None for one device.
    """

    model: str
    decoder: models.Decoder
    params: Any
    tokenizer: Any
    stop: tuple[int, ...]
    pad_id: int
    mesh: Mesh | None = None

    @property
    def config(self) -> models.DecoderConfig:
        """Of the model."""
        return self.decoder.config

    def attach(self, method: pj.Method) -> pj.Peft:
        """The plan of a method on this model."""
        ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        return pj.attach(method, self.decoder.apply_fn, self.params, ids)

    def loss(self, params: Any, input_ids: jax.Array, **rows: jax.Array) -> losses.Loss:
        """Next-token loss of packed rows; the logits of all tokens are never held.

        Args:
          params: theta.
          input_ids: `(size, length)`.
          **rows: the other arrays of a `LanguageBatch`, as `arguments` names them.

        Returns:
          Total and count.
        """
        targets = rows.pop('targets')
        hidden = self.decoder.apply_fn(params, input_ids, **rows, method='hidden')
        head = self.decoder.head_weight(params)
        return losses.next_token_loss(
            hidden, head.weight.astype(hidden.dtype), targets, soft_cap=head.soft_cap
        )


def arguments(batch: LanguageBatch) -> dict[str, Any]:
    """A batch under the names that a model and its virtual tokens know."""
    return {
        'input_ids': batch.input_ids,
        'targets': batch.targets,
        'position_ids': batch.positions,
        'segment_ids': batch.segment_ids,
    }


def fused(peft: pj.Peft, task: Task) -> Callable[..., losses.Loss]:
    """The loss under a method: `loss(params, phi, batch, key)`."""
    forward = peft.wrap(task.loss)

    def loss(params: Any, phi: Any, batch: dict, key: Any = None) -> losses.Loss:
        rest = {name: value for name, value in batch.items() if name != 'input_ids'}
        return forward(params, phi, batch['input_ids'], dropout_key=key, **rest)

    return loss


def load(
    model: str,
    dtype: str,
    quantize: str | None,
    embeddings: bool = False,
    remat: Literal['none', 'full', 'names'] = 'none',
    mesh: Mesh | None = None,
    scan_layers: bool = True,
) -> Task:
    """Loads a decoder and its tokenizer.

    Args:
      model: folder or hub name.
      dtype: of parameters and computation.
      quantize: how the linear layers of the blocks are kept, `nf4`, `int4` or `int8`; None as they
        are.
      embeddings: whether the token embedding and the head are kept so too.
      remat: what a gradient keeps of each layer.
      mesh: over which its weights are spread.
      scan_layers: whether its layers are one stack.

    Returns:
      The task.

    Raises:
      FileNotFoundError: no such folder, or files missing from it.
      ValueError: a model or tokenizer that cannot be read.
    """
    how = rounding(model, quantize, embeddings)
    if mesh is not None:
        config = models.decoder_config(model)
        how['sharding'] = models.decoder_sharding(config, mesh, scan_layers=scan_layers)
    how |= {'dtype': jnp.dtype(dtype), 'remat': remat, 'scan_layers': scan_layers}
    loaded = models.load_decoder(model, **how)
    tokenizer = load_tokenizer(models.model_folder(model))
    stop = stop_tokens(models.model_folder(model), tokenizer)
    pad = tokenizer.pad_token_id
    pad = pad if pad is not None else stop[0] if stop else 0
    return Task(model, loaded.model, loaded.params, tokenizer, stop, pad, mesh)


def rounding(model: str, quantize: str | None, embeddings: bool) -> dict[str, Any]:
    """What `models.load_decoder` is told of quantization.

    Args:
      model: folder or hub name.
      quantize: as of `load`.
      embeddings: as of `load`.

    Returns:
      Scheme and target.

    Raises:
      ValueError: embeddings without a scheme, or a model that is quantized already.
    """
    check_embeddings(quantize, embeddings)
    if quantize is None:
        return {}
    if models.is_quantized(model):
        raise ValueError(
            f'{model} is quantized already: leave --quantize out, or name the model that it was '
            'made of'
        )
    target = quantized(models.decoder_config(model), embeddings)
    return {'scheme': SCHEMES[quantize], 'target': target}


def check_embeddings(quantize: str | None, embeddings: bool) -> None:
    """Refuses to quantize embeddings in no way.

    Raises:
      ValueError: embeddings without a scheme.
    """
    if quantize is None and embeddings:
        raise ValueError('--embeddings says what is quantized, not how: add --quantize nf4')


def quantized(config: models.DecoderConfig, embeddings: bool) -> Target:
    """The parameters that are quantized: the linear layers, if asked the vocabulary's too."""
    linears = models.linears(config)
    return (linears, models.embeddings(config)) if embeddings else linears


def load_tokenizer(folder: pathlib.Path) -> Any:
    """The tokenizer of a folder, with its chat template.

    Raises:
      ValueError: there is none that can be read.
    """
    import transformers

    # tokenizer.json as it stands, whatever class the folder names for it
    whole = (folder / 'tokenizer.json').is_file()
    kind = transformers.PreTrainedTokenizerFast if whole else transformers.AutoTokenizer
    try:
        return kind.from_pretrained(str(folder))
    except Exception as error:  # transformers raises what it likes
        raise ValueError(
            f'{folder} must hold a tokenizer.json, or vocabulary files that transformers reads: '
            f'{error}'
        ) from error


def stop_tokens(folder: pathlib.Path, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a text: the tokenizer's, then those of the folder's configurations."""
    found = [tokenizer.eos_token_id]
    for name in ('generation_config.json', 'config.json'):
        file = folder / name
        said = json.loads(file.read_text('utf-8')).get('eos_token_id') if file.is_file() else None
        found += said if isinstance(said, list) else [said]
    return tuple(dict.fromkeys(int(token) for token in found if token is not None))


def end_of_text(task: Task) -> int:
    """The token behind texts and answers.

    Raises:
      ValueError: neither the tokenizer nor the model names one.
    """
    if not task.stop:
        raise ValueError(
            f'{task.model}: neither tokenizer nor config.json names an end-of-text token. Put '
            'eos_token into tokenizer_config.json'
        )
    return task.stop[0]


def encode(task: Task, records: Any, length: int, answer_only: bool, too_long: Any) -> Any:
    """Records as samples of at most `length` tokens.

    Raises:
      ValueError: a record cannot be learned from, or none can.
    """
    try:
        return data.encode_records(
            task.tokenizer,
            records,
            max_tokens=length,
            answers_only=answer_only,
            too_long=too_long,
            eos_id=end_of_text(task),
        )
    except ValueError as error:
        raise ValueError(f'{error} (--length is {length}, --too-long {too_long})') from error
