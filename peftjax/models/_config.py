"""What a BERT or RoBERTa checkpoint says about its own shape."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from peftjax.models._activations import ACTIVATIONS
from peftjax.models._fields import check_settings, check_sizes

ModelType = Literal['bert', 'roberta']

_PAD_TOKEN_ID = {'bert': 0, 'roberta': 1}

# Settings that change the computation in ways this encoder does not have, and what each must be.
_REQUIRED = {
    'position_embedding_type': 'absolute',
    'is_decoder': False,
    'add_cross_attention': False,
    'pruned_heads': {},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape of a BERT or RoBERTa encoder; the fields are those of Hugging Face's `config.json`.

    Attributes:
      model_type: `'bert'` or `'roberta'`. Decides how positions are counted and how a classifier
        is built.
      vocab_size: rows of the token embedding.
      hidden_size: width of the residual stream, a multiple of `num_attention_heads`.
      num_hidden_layers: number of blocks.
      num_attention_heads: heads of `hidden_size / num_attention_heads` each.
      intermediate_size: width of the feed-forward layer.
      hidden_act: name of the feed-forward activation.
      max_position_embeddings: rows of the position embedding.
      type_vocab_size: rows of the token type embedding.
      layer_norm_eps: added to the variance in every layer norm.
      pad_token_id: RoBERTa counts positions over the tokens that are not this one.
      hidden_dropout_prob: dropout after the embeddings and after each output layer.
      attention_probs_dropout_prob: dropout of the attention weights.
      classifier_dropout: dropout before a classifier; None is `hidden_dropout_prob`.
      initializer_range: standard deviation of freshly drawn weights.
      num_labels: width of a classifier's output.

    Raises:
      ValueError: a value outside of the law above; the message names the field.

    Example:
      >>> EncoderConfig(model_type='bert', vocab_size=64, hidden_size=16, num_hidden_layers=2,
      ...               num_attention_heads=4, intermediate_size=32).head_dim
      4
    """

    model_type: ModelType
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = 'gelu'
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    initializer_range: float = 0.02
    num_labels: int = 2

    def __post_init__(self):
        if self.model_type not in get_args(ModelType):
            raise ValueError(
                f'model_type must be one of {get_args(ModelType)}, got {self.model_type!r}. '
                'Other families have no encoder here.'
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f'hidden_act must be one of {sorted(ACTIVATIONS)}, got {self.hidden_act!r}.'
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f'hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} '
                f'and {self.num_attention_heads}.'
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def position_offset(self) -> int:
        """Position of a sequence's first token: 0, in RoBERTa `pad_token_id + 1`."""
        return self.pad_token_id + 1 if self.model_type == 'roberta' else 0

    @property
    def head_dropout(self) -> float:
        """Dropout before a classifier."""
        given = self.classifier_dropout
        return self.hidden_dropout_prob if given is None else given


def read_config(fields: Mapping[str, Any]) -> EncoderConfig:
    """Reads an `EncoderConfig` from the content of a Hugging Face `config.json`.

    Args:
      fields: the parsed file.

    Returns:
      The encoder's configuration; absent fields take Hugging Face's defaults for the family.

    Raises:
      ValueError: another model type, a missing size, or a setting this encoder does not compute
        (relative positions, decoder, cross attention, pruned heads, an unknown activation).

    Example:
      >>> read_config({'model_type': 'roberta', 'vocab_size': 64, 'hidden_size': 16,
      ...              'num_hidden_layers': 2, 'num_attention_heads': 4,
      ...              'intermediate_size': 32}).pad_token_id
      1
    """
    check_settings(fields, _REQUIRED, 'encoder')
    known = {field.name: field for field in dataclasses.fields(EncoderConfig)}
    needed = [name for name, field in known.items() if field.default is dataclasses.MISSING]
    check_sizes(fields, [name for name in needed if name != 'model_type'])
    family: Any = fields.get('model_type')
    taken = {name: fields[name] for name in known if fields.get(name) is not None}
    taken['model_type'] = family  # a null is refused with the names that there are
    taken.setdefault('pad_token_id', _PAD_TOKEN_ID.get(family, 0))
    if fields.get('id2label') is not None and 'num_labels' not in taken:
        taken['num_labels'] = len(fields['id2label'])
    return EncoderConfig(**taken)
