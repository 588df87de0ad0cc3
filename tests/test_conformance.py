"""Adapters of other libraries, loaded into ours: same outputs, same gradients."""

import pathlib

CASES = pathlib.Path(__file__).parent / 'interop_cases'

HUGGING_FACE = ('classifier/lora_bert_seqcls', 'classifier/prompt_tuning_seqcls')
