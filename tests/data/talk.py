"""A small real tokenizer with chat templates, made on the spot."""

import functools
from typing import Any

import tokenizers

CHATML = (
    '{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}'
    '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
LLAMA = (
    '<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n'
    '{{ m.content | trim }}<|eot_id|>{% endfor %}'
    '{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}'
)
FORGETFUL = (  # as templates that drop the reasoning of earlier answers
    '{% for m in messages %}<|im_start|>{{ m.role }}\n'
    '{{ m.content if loop.last else m.content[:2] }}<|im_end|>\n{% endfor %}'
    '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
GLUED = '{% for m in messages %}{{ m.content }}{% endfor %}'
SPECIAL = (
    '<|begin_of_text|>',
    '<|end_of_text|>',
    '<|im_start|>',
    '<|im_end|>',
    '<|start_header_id|>',
    '<|end_header_id|>',
    '<|eot_id|>',
)
CORPUS = ['the answer is forty two', 'what is the question', 'user assistant system', 'ab ab ab']


@functools.cache
def backend() -> tokenizers.Tokenizer:
    """Byte-level BPE that puts a token in front of every text."""
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    front = SPECIAL[0]
    made.post_processor = processors.TemplateProcessing(
        single=f'{front} $A', special_tokens=[(front, made.token_to_id(front))]
    )
    return made


@functools.cache
def tokenizer(template: str | None = CHATML) -> Any:
    """The same for transformers."""
    import transformers

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend(),
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        chat_template=template,
    )
