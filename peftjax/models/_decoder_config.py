"""What a decoder's block does: the options in which families of language models differ."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Literal

from peftjax.models._activations import ACTIVATIONS
from peftjax.models._rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """Hugging Face's names of a decoder's modules. None: there is no such module.

    What there is says what is computed: a block has those norms that have a name, one product
    instead of three where `query_key_value` has one, and so on.

    Attributes:
      body: everything below the head.
      embedding: token embedding, in the body.
      positions: learned position embedding, in the body.
      layers: the blocks, in the body.
      norm: the norm after the last block.
      head: the linear layer to the vocabulary.
      before_attention: norm of a block, before its attention.
      after_attention: norm of the attention's output, before it is added.
      before_mlp: norm before the feed-forward layer.
      after_mlp: norm of the feed-forward layer's output.
      attention: the attention of a block.
      query: in the attention; with `key` and `value`.
      key: see `query`.
      value: see `query`.
      query_key_value: all three in one product, instead.
      query_norm: norm of each head's query, with `key_norm`.
      key_norm: see `query_norm`.
      output: last product of the attention.
      mlp: the feed-forward layer of a block.
      gate: in it, the product that passes the activation and multiplies `up`.
      up: the product into the inner width; passes the activation where there is no gate.
      gate_up: both in one product, instead.
      down: the product back.
      router: in `mlp`, chooses experts; `gate`, `up` and `down` are then in `experts`.
      experts: see `router`.
    """

    body: str = 'model'
    embedding: str = 'embed_tokens'
    positions: str | None = None
    layers: str = 'layers'
    norm: str = 'norm'
    head: str = 'lm_head'
    before_attention: str = 'input_layernorm'
    after_attention: str | None = None
    before_mlp: str = 'post_attention_layernorm'
    after_mlp: str | None = None
    attention: str = 'self_attn'
    query: str = 'q_proj'
    key: str = 'k_proj'
    value: str = 'v_proj'
    query_key_value: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    output: str = 'o_proj'
    mlp: str = 'mlp'
    gate: str | None = 'gate_proj'
    up: str = 'up_proj'
    gate_up: str | None = None
    down: str = 'down_proj'
    router: str | None = None
    experts: str = 'experts'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm:
    """The norm that all places of a decoder share.

    Attributes:
      kind: `'rms'` divides by the root of the mean square, `'layer'` is layer norm with bias.
      epsilon: added to the mean square or variance.
      offset: added to the stored scale (Gemma stores `scale - 1`).
    """

    kind: Literal['rms', 'layer'] = 'rms'
    epsilon: float = 1e-6
    offset: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """Shape of a block's attention.

    Attributes:
      heads: of the queries.
      kv_heads: of keys and values; divides `heads`.
      head_dim: width of a head.
      scale: of the scores.
      bias: whether query, key and value have one.
      output_bias: whether the last product has one.
      soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`.

    Raises:
      ValueError: `kv_heads` does not divide `heads`, or is zero.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    bias: bool = False
    output_bias: bool = False
    soft_cap: float | None = None

    def __post_init__(self):
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(
                'the number of heads must be a multiple of the number of key and value heads, of '
                f'which there is one at least, got {self.heads} and {self.kv_heads}.'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mlp:
    """Shape of a block's feed-forward layer.

    Attributes:
      width: inner width, of one expert where there are several.
      activation: its Hugging Face name.
      bias: whether the products have one.
      experts: how many there are; 0 is a layer without routing.
      chosen: how many of them serve a token.
      normalized: whether the weights of the chosen add up to one.

    Raises:
      ValueError: an unknown activation, or more experts chosen than there are.
    """

    width: int
    activation: str = 'silu'
    bias: bool = False
    experts: int = 0
    chosen: int = 0
    normalized: bool = True

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f'activation must be one of {sorted(ACTIVATIONS)}, got {self.activation!r}.'
            )
        if self.chosen > self.experts or bool(self.chosen) != bool(self.experts):
            raise ValueError(
                f'a token must be served by 1 to {self.experts} experts, got {self.chosen}.'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What may differ between the layers of one model.

    Attributes:
      window: how many tokens, itself included, a token looks back on; None is all.
      rope: rotation of queries and keys; None where positions are learned.
    """

    window: int | None = None
    rope: Rope | None = None

    @property
    def by_length(self) -> bool:
        """Whether the rotation depends on how long the text is."""
        return self.rope is not None and self.rope.by_length


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder language model; `read_decoder_config` makes it from a `config.json`.

    Attributes:
      vocab_size: rows of the token embedding.
      hidden_size: width of the residual stream.
      layers: kind of each layer, an index into `kinds`.
      kinds: the kinds of layers.
      attention: shape of the attention.
      mlp: shape of the feed-forward layer.
      norm: which norm.
      names: Hugging Face's names of the modules; they say also which there are.
      tied: whether the head is the transposed token embedding.
      positions: rows of the learned position embedding; 0 without one.
      embedding_scale: token vectors are multiplied with it.
      soft_cap: logits become `soft_cap * tanh(logits / soft_cap)`.
      initializer_range: standard deviation of freshly drawn weights.
      source: the `config.json` this was read from, for saving it back.

    Raises:
      ValueError: a layer of unknown kind, or kinds with and without rotation together.

    Example:
      >>> config = DecoderConfig(
      ...     vocab_size=64, hidden_size=16, mlp=Mlp(width=24),
      ...     attention=Attention(heads=4, kv_heads=2, head_dim=4, scale=0.5),
      ...     kinds=(LayerKind(rope=Rope(dim=4, theta=1e4)),), layers=(0, 0))
      >>> config.num_hidden_layers
      2
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[int, ...]
    kinds: tuple[LayerKind, ...]
    attention: Attention
    mlp: Mlp
    norm: Norm = Norm()
    names: Names = Names()
    tied: bool = False
    positions: int = 0
    embedding_scale: float = 1.0
    soft_cap: float | None = None
    initializer_range: float = 0.02
    source: str = dataclasses.field(default='', repr=False)

    def __post_init__(self):
        if not self.layers or not set(self.layers) <= set(range(len(self.kinds))):
            raise ValueError(
                f'every layer must be of one of the {len(self.kinds)} kinds, got {self.layers}.'
            )
        if len({kind.rope is None for kind in self.kinds}) != 1:
            raise ValueError('layers with and without rotation in one model are not computed.')

    @property
    def dtype(self) -> str:
        """What the `config.json` says of the dtype of its weights; float32 where it names none.

        The weights may have another: `abstract_decoder` asks them.
        """
        fields = json.loads(self.source) if self.source else {}
        said = fields.get('dtype') or fields.get('torch_dtype') or 'auto'
        return 'float32' if said == 'auto' else str(said)

    def is_scanned(self, paths: Iterable[str]) -> bool:
        """Whether these are the parameters of a model whose layers are one stack.

        Args:
          paths: of all its leaves.

        Returns:
          False where each layer has leaves of its own, as with `scan_layers=False`.
        """
        first = f'{self.names.body}/{self.names.layers}/0/'
        return not any(path.startswith(first) for path in paths)

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers)
