"""A small Llama learns to write plays, then by each method to answer questions.

    python benchmarks/small_llama.py --plays input.txt --train train.jsonl --test test.jsonl

The plays are tinyshakespeare, the questions those of GSM8K; two cores are enough.

Everything goes through the commands, as a user would run them: `tune --method full` on the plays,
`merge` to a folder, `tune` with each method on questions and answers, `generate` before and after,
`merge` again, `export`. The same prompts must give the same answers merged and unmerged, and PEFT,
where it is installed, must compute the same logits from the exported adapter over that folder. One
JSON line goes to standard output. What is in `--out` already is not made again.
"""

import argparse
import contextlib
import io
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from peftjax import cli
from peftjax.models import Decoder, read_decoder_config, save_decoder

SHAPE = {
    'model_type': 'llama', 'vocab_size': 1024, 'hidden_size': 192, 'num_hidden_layers': 6,
    'num_attention_heads': 6, 'intermediate_size': 512, 'max_position_embeddings': 512,
    'eos_token_id': 1, 'pad_token_id': 0, 'bos_token_id': 1, 'rms_norm_eps': 1e-5,
}  # fmt: skip
RATES = {'full': 1e-3, 'lora': 5e-3, 'adapter': 3e-3, 'prefix': 3e-2}
"""One guess each."""

PROMPTS = ('Question: Tom has 3 apples and buys 4 more. How many apples does he have?\nAnswer:',
           'Question: A book costs $5. How much do 6 books cost?\nAnswer:')  # fmt: skip


def run(*arguments):
    """A command; what it prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = cli.main([str(argument) for argument in arguments])
    if code:
        raise SystemExit(f'{arguments}: {code}')
    return said.getvalue()


def write_texts(options):
    """The plays in pieces, and the questions with their answers, as the commands want them."""
    plays = pathlib.Path(options.plays).read_text('utf-8')
    pieces = [plays[i : i + 700] for i in range(0, len(plays), 700)]
    lines = [json.dumps({'text': piece}) for piece in pieces]
    held = len(lines) // 20
    (options.out / 'plays.jsonl').write_text('\n'.join(lines[:-held]))
    (options.out / 'plays-held.jsonl').write_text('\n'.join(lines[-held:]))
    for name, path, count in (
        ('train', options.train, options.examples),
        ('test', options.test, 200),
    ):
        rows = [json.loads(line) for line in open(path, encoding='utf-8')][:count]
        lines = [json.dumps({'prompt': f'Question: {row["question"]}\nAnswer:',
                             'completion': ' ' + row['answer']}) for row in rows]  # fmt: skip
        (options.out / f'{name}.jsonl').write_text('\n'.join(lines))


def write_fresh(options):
    """A model that knows nothing, and a tokenizer made of both kinds of text."""
    folder = options.out / 'fresh'
    config = read_decoder_config(SHAPE)
    params = jax.jit(Decoder(config).init)(jax.random.key(0), jnp.ones((1, 2), jnp.int32))['params']
    save_decoder(folder, config, params)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE['vocab_size'], special_tokens=['<pad>', '<end>'], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    texts = [(options.out / name).read_text() for name in ('plays.jsonl', 'train.jsonl')]
    tokenizer.train_from_iterator((line for text in texts for line in text.split('\n')), trainer)
    tokenizer.save(str(folder / 'tokenizer.json'))
    named = {'pad_token': '<pad>', 'eos_token': '<end>'}
    (folder / 'tokenizer_config.json').write_text(json.dumps(named))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def tune(options, name, *arguments):
    """One run, unless it is there; its evaluation losses before and after, and its seconds."""
    out = options.out / name
    common = ('--length', 320, '--batch', 12, '--too-long', 'drop', '--evaluations', 1)
    if not (out / 'adapter').is_dir():
        run('tune', *arguments, *common, '--out', out)
    rows = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]
    losses = [row['evaluation_loss'] for row in rows if 'evaluation_loss' in row]
    return {
        'before': round(losses[0], 4),
        'after': round(losses[-1], 4),
        'steps': rows[-1]['step'],
        'seconds': round(rows[-1]['seconds'], 1),
    }


def answers(*model):
    """What follows the prompts."""
    said = run('generate', *model, *PROMPTS, '--max-tokens', 60)
    return [json.loads(line)['completion'] for line in said.splitlines()]


def beside_peft(base, exported, merged):
    """The largest difference between logits of PEFT's model and of the merged one; or None."""
    try:
        import peft
        import torch
        import transformers
    except ImportError:
        return None
    load = transformers.AutoModelForCausalLM.from_pretrained
    adapted = peft.PeftModel.from_pretrained(load(base), exported).eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(2, 1000, (4, 64)))
    with torch.no_grad():
        return float((adapted(ids).logits - load(merged)(ids).logits).abs().max())


def adapt(options, base, method):
    """One method on the questions; merged and exported where that can be."""
    data = ('--model', base, '--data', options.out / 'train.jsonl', '--answer-only')
    held = ('--eval-data', options.out / 'test.jsonl', '--epochs', options.epochs)
    found = tune(options, method, '--method', method, '--rate', RATES[method], *data, *held)
    found['samples'] = answers(options.out / method)
    merged, exported = (options.out / f'{method}-{what}' for what in ('merged', 'exported'))
    if method in ('lora', 'full'):
        if not merged.is_dir():
            run('merge', options.out / method, '--out', merged)
        assert answers('--model', merged) == found['samples'], 'merged, it answers otherwise'
        found['merged'] = 'the same answers'
    if method == 'lora':
        if not exported.is_dir():
            run('export', options.out / method, '--out', exported)
        found['logits_beside_peft'] = beside_peft(base, exported, merged)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--plays', required=True, help='a text')
    parser.add_argument('--train', required=True, help='jsonl with question and answer')
    parser.add_argument('--test', required=True, help='likewise')
    parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('runs/small_llama'))
    parser.add_argument('--plays-epochs', type=int, default=4)
    parser.add_argument('--epochs', type=int, default=3, help='on the questions')
    parser.add_argument('--examples', type=int, default=1500, help='questions to learn from')
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    write_texts(options)
    if not (options.out / 'fresh').is_dir():
        write_fresh(options)
    base = options.out / 'base'
    plays = tune(
        options, 'plays', '--model', options.out / 'fresh', '--data', options.out / 'plays.jsonl',
        '--eval-data', options.out / 'plays-held.jsonl', '--method', 'full', '--rate', 2e-3,
        '--epochs', options.plays_epochs,
    )  # fmt: skip
    if not base.is_dir():
        run('merge', options.out / 'plays', '--out', base)
    line = {'plays': plays, 'samples_before': answers('--model', base)}
    line |= {method: adapt(options, base, method) for method in RATES}
    told = {'epochs': options.epochs, 'examples': options.examples, 'rates': RATES}
    print(json.dumps(line | told | {'seconds': round(time.perf_counter() - began)}))


if __name__ == '__main__':
    main()
