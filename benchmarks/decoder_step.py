"""LoRA on every linear layer of a small Llama: our step beside PyTorch + Hugging Face PEFT.

The programs live in one process and take turns, step by step, on the same batch; peak memory and
the time to the first step are measured in a process of their own each. All read the same random
checkpoint from a Hugging Face folder, so that their first losses must agree. Prints one JSON line.
Programs: peftjax, torch (eager), compiled (`torch.compile`). Needs torch, transformers and peft:
`python benchmarks/decoder_step.py --threads 2 >> benchmarks/results/decoder_step.jsonl`.
"""

import argparse
import json
import tempfile

import beside
import numpy as np

RANK, RATE = 8, 1e-4
SHAPE = {
    'model_type': 'llama',
    'architectures': ['LlamaForCausalLM'],
    'vocab_size': 32000,
    'hidden_size': 512,
    'num_hidden_layers': 8,
    'num_attention_heads': 8,
    'num_key_value_heads': 8,
    'intermediate_size': 1408,
}
TINY = {'vocab_size': 100, 'hidden_size': 32, 'num_hidden_layers': 2, 'intermediate_size': 48}
LINEARS = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')


def write_checkpoint(folder, shape):
    """A random Llama, with the weights that transformers would draw."""
    import jax

    from peftjax.models import Decoder, read_decoder_config, save_decoder

    config = read_decoder_config(shape)
    params = jax.jit(Decoder(config).init)(jax.random.key(0), np.zeros((1, 2), np.int32))['params']
    save_decoder(folder, config, params)


def draw_ids(args):
    vocabulary = (SHAPE | TINY if args.tiny else SHAPE)['vocab_size']
    rng = np.random.default_rng(0)
    return rng.integers(0, vocabulary, (args.rows, args.tokens)).astype(np.int32)


def our_step(args):
    import jax
    import jax.numpy as jnp
    import optax

    import peftjax as pj
    from peftjax.losses import next_token_loss, next_tokens
    from peftjax.models import load_decoder

    model, params, _ = load_decoder(args.folder, remat=args.remat)
    ids = jnp.asarray(draw_ids(args))
    method = pj.Lora(rank=RANK, alpha=RANK, target=rf'layers/.*({"|".join(LINEARS)})/kernel')
    peft = pj.attach(method, model.apply_fn, params, ids)

    def loss(params, ids):
        hidden = model.apply_fn(params, ids, method='hidden')
        head = model.head_weight(params).weight
        return next_token_loss(hidden, head, next_tokens(ids)).mean

    wrapped, tx = peft.wrap(loss), optax.adamw(RATE)
    update = pj.train_step(lambda params, phi, ids, key: wrapped(params, phi, ids), tx)
    state = [pj.start(tx, jax.jit(peft.init)(jax.random.key(1), params), jax.random.key(2))]

    def step():
        state[0], value = update(params, state[0], ids)
        return float(value)

    return step, peft.count()


def their_step(args, compiled):
    import peft
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32)
    lora = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LINEARS))
    model = peft.get_peft_model(base, lora).train()
    ids = torch.from_numpy(draw_ids(args)).long()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    forward = torch.compile(model) if compiled else model

    def step():
        optimizer.zero_grad()
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step, sum(p.numel() for p in trained)


def build(name, args):
    return our_step(args) if name == 'peftjax' else their_step(args, name == 'compiled')


def main():
    programs = ('peftjax', 'torch', 'compiled')
    parser = beside.parser(__doc__, rows=4, tokens=512, programs=programs)
    parser.add_argument('--remat', default='names', help='what our gradient keeps of each layer')
    parser.add_argument('--tiny', action='store_true', help='a tiny model, to see that all runs')
    parser.add_argument('--folder', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        return beside.run_alone(build, args)
    with tempfile.TemporaryDirectory() as root:
        args.folder = f'{root}/llama'
        write_checkpoint(args.folder, SHAPE | TINY if args.tiny else SHAPE)
        more = ('--folder', args.folder)
        print(json.dumps(beside.measure('decoder_step', build, args, same=True, more=more)))


if __name__ == '__main__':
    main()
