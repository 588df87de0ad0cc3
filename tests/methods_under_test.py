"""Every method with representative settings, for the models of `blocks`."""

import dataclasses

import peftjax as pj

W = '(kernel|weight)'
QUERY_VALUE = rf'(query|value)/{W}'
KEY, VALUE = rf'key/{W}', rf'value/{W}'
DOWN = rf'(down|layer/output/dense)/{W}'
ALL = '(kernel|weight|embedding)$'
LINEAR = rf'(query|key|value|up|down|dense)/{W}'
EMBEDDING = r'(wte|word_embeddings)/'
UP_DOWN = 'up/kernel', 'down/kernel'
NORMED = dataclasses.replace(pj.HOULSBY, norm='both', reduction=2)

PROMPT = pj.PromptTuning(length=3, target=EMBEDDING)
PREFIX = pj.PrefixTuning(length=3, target=(KEY, VALUE))
NAMED_PREFIX = pj.PrefixTuning(length=3)
SMALL = pj.Lora(rank=2, target=QUERY_VALUE)

EVERYWHERE = {
    'lora': SMALL,
    'lora_all': pj.Lora(rank=2, alpha=3.0, target=LINEAR),
    'lora_patterns': pj.Lora(
        rank=2,
        alpha=4.0,
        rank_stabilized=True,
        ranks=(('value', 1), ('(wte|word)', 3)),
        alphas=(('query', 3.0),),
        target=(QUERY_VALUE, EMBEDDING),
    ),
    'dora': pj.Dora(rank=2, target=LINEAR),
    'dora_embedding': pj.Dora(rank=2, alpha=1.0, target=(DOWN, EMBEDDING)),
    'ia3': pj.Ia3(target=(KEY, VALUE, DOWN), feedforward=DOWN),
    'adapter': pj.Adapter(target=(DOWN, QUERY_VALUE), reduction=2, activation='tanh'),
    'adapter_options': pj.Adapter(
        target=DOWN, reduction=2, activation='gelu', norm='before', gate=True, scale='channel'
    ),
    'adapter_learned': pj.Adapter(
        target=QUERY_VALUE, reduction=2, activation='silu', gate=True, scale='learned'
    ),
    'houlsby': dataclasses.replace(pj.HOULSBY, reduction=2),
    'houlsby_normed': NORMED,
    'pfeiffer': dataclasses.replace(pj.PFEIFFER, reduction=2, activation='gelu'),
    'parallel': pj.PARALLEL,
    'scaled_parallel': pj.SCALED_PARALLEL,
    'prompt': PROMPT,
    'prompt_back': dataclasses.replace(PROMPT, side='back', initial=(1, 2)),
    'prompt_named': dataclasses.replace(PROMPT, target='@embeddings', initial='random'),
    'prefix': PREFIX,
    'prefix_back': dataclasses.replace(PREFIX, side='back', projection=5),
    'prefix_named': NAMED_PREFIX,
    'prefix_named_projected': dataclasses.replace(NAMED_PREFIX, projection=5),
    'bitfit': pj.BitFit(),
    'norms': pj.NormTuning(),
    'tokens': pj.TrainableTokens(target=EMBEDDING, ids=(1, 4)),
    'layer': pj.Trainable(target=DOWN),
    'everything': pj.Trainable(target='.'),
    'lora_ia3': pj.chain(SMALL, pj.Ia3(target=QUERY_VALUE)),
    'lora_twice': pj.chain(SMALL, pj.Lora(rank=1, target=LINEAR)),
    'dora_over_lora': pj.chain(SMALL, pj.Dora(rank=2, target=QUERY_VALUE)),
    'trained_lora_adapter': pj.chain(
        pj.Trainable(target=DOWN),
        pj.Lora(rank=2, target=DOWN),
        pj.Adapter(target=DOWN, reduction=2),
    ),
    'prompt_prefix_norms': pj.chain(PROMPT, PREFIX, pj.NormTuning()),
    'ia3_prefix_named': pj.chain(pj.Ia3(target=(KEY, VALUE)), NAMED_PREFIX),
}
"""On models with attention."""

EXPERTS = {
    'lora': pj.Lora(rank=2, target=UP_DOWN),
    'dora': pj.Dora(rank=2, target=UP_DOWN),
    'ia3': pj.Ia3(target=UP_DOWN, feedforward='down'),
    'ia3_output': pj.Ia3(target=UP_DOWN),
    'adapter': pj.Adapter(target=UP_DOWN, reduction=2, scale='learned', norm='before'),
    'bitfit': pj.BitFit(),
    'everything': pj.Trainable(target='.'),
    'chain': pj.chain(pj.Lora(rank=2, target=UP_DOWN), pj.Ia3(target='up/kernel')),
}

RAGGED = {name: EXPERTS[name] for name in ('lora', 'dora', 'ia3', 'ia3_output', 'adapter')}

CONVOLUTION = {
    'lora': pj.Lora(rank=2, target='up/kernel'),
    'dora': pj.Dora(rank=2, target='up/kernel'),
    'ia3': pj.Ia3(target='up/kernel'),
    'adapter': pj.Adapter(
        target='up/kernel', reduction=2, scale='learned', gate=True, norm='before'
    ),
    'bitfit': pj.BitFit(),
    'everything': pj.Trainable(target='.'),
    'chain': pj.chain(pj.Dora(rank=2, target='up/kernel'), pj.Ia3(target='up/kernel')),
}
