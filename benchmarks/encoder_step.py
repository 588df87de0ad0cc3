"""LoRA on every linear layer of an encoder: our step beside PyTorch + Hugging Face PEFT (eager).

Both programs live in one process and take turns, step by step, on the same batches; peak memory
and the time to the first step are measured in a process of their own each. Prints one JSON line.
Programs: fused, plain (both ours), torch. Needs torch, transformers and peft:
`python benchmarks/encoder_step.py`.
"""

import dataclasses
import json

import beside
import numpy as np

SHAPE = dict(
    vocab_size=30522,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
LABELS, RANK, RATE = 6, 8, 1e-4


@dataclasses.dataclass(frozen=True)
class Batch:
    """Token ids, attention mask and labels."""

    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray


def draw_batch(rows, tokens, seed=0):
    """Sentences of half to full length, padded at the end."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(tokens // 2, tokens + 1, rows)
    lengths[0] = tokens
    mask = (np.arange(tokens)[None] < lengths[:, None]).astype(np.int32)
    ids = rng.integers(1000, SHAPE['vocab_size'], (rows, tokens)).astype(np.int32) * mask
    return Batch(ids, mask, rng.integers(0, LABELS, rows).astype(np.int32))


def our_step(batch, attention):
    import jax
    import jax.numpy as jnp
    import optax

    import peftjax as pj
    from peftjax.models import Compute, EncoderConfig, SequenceClassifier

    config = EncoderConfig(model_type='bert', num_labels=LABELS, **SHAPE)
    model = SequenceClassifier(config, Compute(attention=attention))
    ids, mask, labels = map(jnp.asarray, (batch.ids, batch.mask, batch.labels))
    params = jax.jit(model.init)(jax.random.key(0), ids[:1, :2])['params']
    method = pj.Lora(rank=RANK, alpha=RANK, target=r'encoder/layer/.*kernel')
    peft = pj.attach(method, model.apply_fn, params, ids, mask)
    forward, phi = peft.wrap(model.apply_fn), peft.init(jax.random.key(1), params)
    optimizer = optax.adamw(RATE)

    def loss(phi, params):
        logits = forward(params, phi, ids, mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def update(params, phi, state):
        value, gradient = jax.value_and_grad(loss)(phi, params)
        change, state = optimizer.update(gradient, state, phi)
        return value, optax.apply_updates(phi, change), state

    held = [phi, jax.jit(optimizer.init)(phi)]

    def step():
        value, *held[:] = update(params, *held)
        return float(value)

    return step, sum(leaf.size for leaf in jax.tree.leaves(phi))


def their_step(batch, threads):
    import peft
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = transformers.BertConfig(num_labels=LABELS, **SHAPE)
    base = transformers.BertForSequenceClassification(config)
    target = r'.*encoder\.layer\..*\.(query|key|value|dense)'
    lora = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=target)
    model = peft.get_peft_model(base, lora).train()
    ids, mask, labels = (torch.from_numpy(x).long() for x in (batch.ids, batch.mask, batch.labels))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)

    def step():
        optimizer.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step, sum(p.numel() for p in trained)


def build(name, args):
    batch = draw_batch(args.rows, args.tokens)
    return their_step(batch, args.threads) if name == 'torch' else our_step(batch, name)


def main():
    args = beside.parser(__doc__, rows=32, tokens=128, programs=('fused', 'torch')).parse_args()
    if args.alone:
        return beside.run_alone(build, args)
    print(json.dumps(beside.measure('encoder_step', build, args)))


if __name__ == '__main__':
    main()
