"""What `gpu.py` measures: models, sides, goals, and what a token costs at least."""

from typing import NamedTuple

RANK = 16
LLAMA_8B = {
    'model_type': 'llama', 'vocab_size': 128256, 'hidden_size': 4096, 'intermediate_size': 14336,
    'num_hidden_layers': 32, 'num_attention_heads': 32, 'num_key_value_heads': 8, 'head_dim': 128,
    'max_position_embeddings': 131072, 'rms_norm_eps': 1e-5, 'rope_theta': 500000.0,
    'rope_scaling': {
        'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
        'original_max_position_embeddings': 8192,
    },
    'tie_word_embeddings': False,
}  # fmt: skip
QWEN_1_7B = {
    'model_type': 'qwen3', 'vocab_size': 151936, 'hidden_size': 2048, 'intermediate_size': 6144,
    'num_hidden_layers': 28, 'num_attention_heads': 16, 'num_key_value_heads': 8, 'head_dim': 128,
    'max_position_embeddings': 40960, 'rms_norm_eps': 1e-6, 'rope_theta': 1000000.0,
    'tie_word_embeddings': True,
}  # fmt: skip
QWEN_0_6B = QWEN_1_7B | {'hidden_size': 1024, 'intermediate_size': 3072}
MODELS = {'llama-3.1-8b': LLAMA_8B, 'qwen3-1.7b': QWEN_1_7B, 'qwen3-0.6b': QWEN_0_6B}
TINY = {
    'vocab_size': 512, 'hidden_size': 128, 'intermediate_size': 192, 'num_hidden_layers': 2,
    'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 64,
}  # fmt: skip
SHRINK = 64  # by which rows are shorter with tiny shapes
LENGTHS = (4096, 2048)
SIDES = (
    ('peftjax', 'names'), ('torch', 'full'), ('torch-bfloat16', 'full'), ('peftjax', 'full'),
    ('peftjax', 'none'), ('torch', 'none'), ('torch-bfloat16', 'none'),
)  # fmt: skip

BESIDE = {'over_torch': 1.5, 'peak_over_torch': 0.6}
GOALS = {
    'llama-3.1-8b': {'mfu': 0.55, 'mfu_stretch': 0.65, 'peak_gib': 43, **BESIDE},
    'qwen3-1.7b': {'mfu': 0.45, **BESIDE},
    'qwen3-0.6b': {'mfu': 0.40, **BESIDE},
}
"""Of our side; the peer is PyTorch with checkpointing, the faster of its two kinds of adapters."""

TESTS = {
    'tests/kernel': ('tests/models/test_kernel.py',),
    'tests/float32': (
        'tests/models/test_attention.py', 'tests/models/test_decoder.py', 'tests/test_losses.py',
        'tests/test_quantize.py',
    ),
}  # fmt: skip
"""cuDNN's attention against the formula, and numbers that a GPU sums in another order."""


class Piece(NamedTuple):
    """What one process does."""

    model: str
    length: int
    side: str
    remat: str

    @property
    def name(self):
        """How it is picked, and found again in the results."""
        return f'{self.model}/{self.length}/{self.side}/{self.remat}'

    def told(self, options):
        """What its process is told."""
        tiny = options.tiny
        length = self.length // SHRINK if tiny else self.length
        tokens = options.tokens // SHRINK if tiny else options.tokens
        return {
            **self._asdict(),
            'length': length,
            'fields': MODELS[self.model] | (TINY if tiny else {}),
            'batch': [tokens // length, length],
            'chunk': options.chunk,
            'windows': 2 if tiny else options.windows,
            'window_s': 0 if tiny else 2,
            'matrix': 256 if tiny else 8192,
            'device': options.device,
        }

    def seconds(self, options):
        """Roughly, on a GPU: to start, then windows at half of an H100's speed in products."""
        each = options.tokens * count(MODELS[self.model], self.length).minimum / 4e14
        each *= (1 if self.side == 'peftjax' else 1.6) * (1.3 if self.remat == 'full' else 1)
        start = 75 if self.side == 'peftjax' else 40
        return start + 5 * each + options.windows * (2 + each / 2)


PIECES = [
    Piece(model, length, side, remat)
    for length in LENGTHS
    for model in MODELS
    for side, remat in SIDES
]
"""What matters most first."""


class Counts(NamedTuple):
    """What a token takes.

    Attributes:
      products: parameters of the base that are multiplied with; of them no gradient is wanted.
      attention: FLOPs of causal attention, forward.
      phi: trained parameters.
    """

    products: int
    attention: int
    phi: int

    @property
    def minimum(self):
        """FLOPs: the base forward and back to its input, attention thrice, phi and its gradient."""
        return 4 * self.products + 3 * self.attention + 6 * self.phi


def count(fields, length):
    """Of a model, in rows of this length."""
    names = ('hidden_size', 'intermediate_size', 'num_hidden_layers', 'head_dim')
    width, inner, layers, head = (fields[name] for name in names)
    query, kept = (head * fields[f'num_{of}_heads'] for of in ('attention', 'key_value'))
    linears = [(width, query), (width, kept), (width, kept), (query, width)]
    linears += [(width, inner), (width, inner), (inner, width)]
    return Counts(
        products=layers * sum(a * b for a, b in linears) + width * fields['vocab_size'],
        attention=2 * length * query * layers,
        phi=layers * RANK * sum(a + b for a, b in linears),
    )
