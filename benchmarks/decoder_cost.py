"""What a gradient step of a small Llama costs for each method: exact figures of XLA's compiler.

For every method, on scanned layers: FLOPs and bytes of temporaries over those of the same method
written into the model by hand (`tests/llama.py`; the compiler counts a loop's body once, on both
sides). Over full fine-tuning of the same model: temporaries, the same with the results (loss and
gradient), and FLOPs with the layers unrolled and the loss in one chunk, so that all are counted.
Prints one JSON line each; nothing is computed.

With `--compile`, seconds to compile the LoRA step at 4, 16 and 64 scanned layers instead, in turns.

`python benchmarks/decoder_cost.py >> benchmarks/results/decoder_cost.jsonl`
"""

import argparse
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'tests'))
import llama

import peftjax as pj
from peftjax.models import Compute, Decoder, read_decoder_config

FIELDS = {
    'model_type': 'llama',
    'vocab_size': 32000,
    'hidden_size': 512,
    'num_attention_heads': 8,
    'num_key_value_heads': 8,
    'intermediate_size': 1408,
}
SCANNED, UNROLLED = Compute(), Compute(scan_layers=False)
MORE = {  # these have no place in `llama.METHODS`: by hand they are gradients of other leaves
    'norms': pj.NormTuning(),
    'new tokens': pj.TrainableTokens(target='embed_tokens', ids=tuple(range(16))),
}


class Shapes:
    """A decoder of so many layers and a batch for it, as shapes."""

    def __init__(self, args, layers):
        self.config = read_decoder_config(FIELDS | {'num_hidden_layers': layers})
        self.ids = jax.ShapeDtypeStruct((args.rows, args.tokens), jnp.int32)

    def compiled(self, model, forward, phi, chunk):
        """The gradient step of phi."""
        params = llama.abstract(model, self.ids)
        step, batch = llama.step(model, forward, chunk), (self.ids, self.ids)
        return jax.jit(step).lower(phi, params, *batch).compile()

    def ours(self, method, compute=SCANNED, chunk=256):
        """The step of a method on our decoder, and phi."""
        model = Decoder(self.config, compute)
        peft, forward = llama.ours(method, model, self.ids)
        phi = jax.eval_shape(peft.init, jax.random.key(0), llama.abstract(model, self.ids))
        return self.compiled(model, forward, phi, chunk), phi

    def by_hand(self, name, phi):
        """The step by hand, of the same phi."""
        forward = llama.by_hand(name, self.config)
        return self.compiled(Decoder(self.config), forward, phi, 256)

    def full(self, compute=SCANNED, chunk=256):
        """The gradient of all parameters, without the engine."""
        model = Decoder(self.config, compute)

        def loss(params, ids, targets):
            forward = lambda params, phi, ids: model.apply_fn(params, ids, method='hidden')
            return llama.loss(model, forward, chunk)(None, params, ids, targets)

        step = jax.jit(jax.value_and_grad(loss))
        return step.lower(llama.abstract(model, self.ids), self.ids, self.ids).compile()


def flops(program):
    return int(program.cost_analysis()['flops'])


def temporaries(program):
    return program.memory_analysis().temp_size_in_bytes


def held(program):
    return temporaries(program) + program.memory_analysis().output_size_in_bytes


def costs(args):
    shapes, whole = Shapes(args, args.layers), args.rows * args.tokens
    full, full_unrolled = shapes.full(), shapes.full(UNROLLED, whole)
    methods = {name: method for name, (method, _) in llama.METHODS.items()} | MORE
    for name, method in methods.items():
        program, phi = shapes.ours(method)
        unrolled, _ = shapes.ours(method, UNROLLED, whole)
        line = facts(args, method=name, phi=sum(leaf.size for leaf in jax.tree.leaves(phi)))
        if name in llama.METHODS:
            twin = shapes.by_hand(name, phi)
            line['flops_over_by_hand'] = round(flops(program) / flops(twin), 5)
            line['bytes_over_by_hand'] = round(temporaries(program) / temporaries(twin), 5)
        line['gflops'] = round(flops(unrolled) / 1e9, 1)
        line['flops_over_full'] = round(flops(unrolled) / flops(full_unrolled), 3)
        line['mib'] = round(temporaries(program) / 2**20, 1)
        line['bytes_over_full'] = round(temporaries(program) / temporaries(full), 3)
        line['with_results_over_full'] = round(held(program) / held(full), 3)
        yield line
    yield facts(
        args,
        method='full fine-tuning',
        gflops=round(flops(full_unrolled) / 1e9, 1),
        mib=round(temporaries(full) / 2**20, 1),
    )


def seconds(args):
    """To trace, lower and compile, everything fresh."""
    times = {depth: [] for depth in (4, 16, 64)}
    for turn in range(args.turns + 1):
        for depth, found in times.items():
            jax.clear_caches()
            start = time.perf_counter()
            Shapes(args, depth).ours(llama.METHODS['LoRA'][0])
            if turn:  # the first imports and warms up
                found.append(time.perf_counter() - start)
    least = {depth: round(min(found), 2) for depth, found in times.items()}
    return facts(args, compile_s=least, ratio=round(least[64] / least[4], 3))


def facts(args, **more):
    batch = [args.rows, args.tokens]
    return {'case': 'decoder_cost', 'batch': batch, 'jax': jax.__version__, **more}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rows', type=int, default=4)
    parser.add_argument('--tokens', type=int, default=512)
    parser.add_argument('--layers', type=int, default=4)
    parser.add_argument('--turns', type=int, default=3)
    parser.add_argument('--compile', action='store_true', help='seconds to compile instead')
    args = parser.parse_args()
    for line in [seconds(args)] if args.compile else costs(args):
        print(json.dumps(line), flush=True)


if __name__ == '__main__':
    main()
