"""The sides of `gpu.py`: our LoRA step, and that of PyTorch with PEFT.

Each is a function of what it is told (`gpu_cases.Piece.told`) to a `Side`, and has a large product
of its framework for the ceiling. Frameworks are imported where they are used.
"""

import contextlib
import math
import pathlib
import re
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from gpu_cases import RANK

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # a checkout need not be installed

RATE = 1e-4
LINEARS = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')


class Side(NamedTuple):
    """A program that trains.

    Attributes:
      step: makes one update and returns its loss, which need not be there yet.
      wait: until a loss is there; returns it.
      memory: bytes that were held at most, by name, as the framework's allocator tells.
      facts: what else is to be known of it.
    """

    step: Callable[[], Any]
    wait: Callable[[Any], float]
    memory: Callable[[], dict[str, int]]
    facts: dict[str, Any]


def draw_ids(told):
    """Tokens, int32."""
    import numpy as np

    vocabulary = told['fields']['vocab_size']
    return np.random.default_rng(0).integers(0, vocabulary, told['batch']).astype(np.int32)


# Ours --------------------------------------------------------------------------------------------


def our_parts(told):
    """Shapes of theta and of a batch, the method, the loss of `train_step`, and the optimizer."""
    import jax
    import jax.numpy as jnp
    import optax

    import peftjax as pj
    from peftjax.losses import next_token_loss, next_tokens
    from peftjax.models import Compute, Decoder, linears, read_decoder_config
    from peftjax.models._load_decoder import saved_names

    half = {'dtype': jnp.bfloat16, 'param_dtype': jnp.bfloat16}
    compute = Compute(save=saved_names(told['remat']), **half)
    model = Decoder(read_decoder_config(told['fields']), compute)
    ids = jax.ShapeDtypeStruct(tuple(told['batch']), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)['params']

    def mean(params, ids):
        hidden = model.apply_fn(params, ids, method='hidden')
        head = model.head_weight(params).weight
        return next_token_loss(hidden, head, next_tokens(ids), chunk=told['chunk']).mean

    method = pj.Lora(rank=RANK, alpha=RANK, target=linears(model.config))
    peft = pj.attach(method, mean, shapes, ids)
    wrapped = peft.wrap(mean)
    loss = lambda params, phi, ids, key: wrapped(params, phi, ids)
    return shapes, ids, peft, loss, optax.adamw(RATE)


def draw(shapes):
    """Random weights, drawn in parts: a whole leaf in float32 would be more than a step holds."""
    import jax
    import jax.numpy as jnp

    def leaf(path, shape, key):
        if path.endswith('scale'):
            return jnp.ones(shape.shape, shape.dtype)
        parts = shape.shape[0] if len(shape.shape) > 2 else math.gcd(shape.shape[0], 64)
        size = (math.prod(shape.shape) // parts,)
        part = lambda key: (0.02 * jax.random.normal(key, size)).astype(shape.dtype)
        fill = lambda key: jax.lax.map(part, jax.random.split(key, parts)).reshape(shape.shape)
        return jax.block_until_ready(jax.jit(fill)(key))

    flat, tree = jax.tree_util.tree_flatten_with_path(shapes)
    keys = jax.random.split(jax.random.key(0), len(flat))
    paths = [jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in flat]
    leaves = [
        leaf(path, shape, key) for path, (_, shape), key in zip(paths, flat, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, leaves)


def ours(told):
    import jax
    import jax.numpy as jnp
    from jax.extend import backend

    import peftjax as pj

    shapes, _, peft, loss, tx = our_parts(told)
    began = time.perf_counter()
    params, ids = draw(shapes), jnp.asarray(draw_ids(told))
    state = pj.start(tx, jax.jit(peft.init)(jax.random.key(1), params), jax.random.key(2))
    state = [jax.block_until_ready(state)]
    device, drawn = jax.devices()[0], time.perf_counter()
    lowered = pj.train_step(loss, tx).lower(params, state[0], ids)
    compiled = lowered.compile()
    facts = {
        'phi': peft.count(),
        'loss_is': f'next token, fused with the head, {told["chunk"]} tokens at once',
        'weights_s': round(drawn - began, 2),
        'compile_s': round(time.perf_counter() - drawn, 2),
        'peak_bytes_before_steps': peak(device),
        'compiler_bytes': planned(compiled.memory_analysis()),
        'attention': kernels(lowered.as_text(), told),
        'platform': backend.get_backend().platform_version.replace('\n', ', '),
    }

    def step():
        state[0], value = compiled(params, state[0], ids)
        return value

    # the loss is there before phi is: a window ends when all is
    wait = lambda value: float(jax.block_until_ready((value, state[0]))[0])
    return Side(step, wait, lambda: {'peak_bytes': peak(device)}, facts)


def peak(device):
    """Bytes that were given out at most since the process began; a CPU does not count them."""
    return (device.memory_stats() or {}).get('peak_bytes_in_use')


def planned(memory):
    """What the compiler says of memory, those results that are donated arguments counted once."""
    return {
        'arguments': memory.argument_size_in_bytes,
        'results': memory.output_size_in_bytes - memory.alias_size_in_bytes,
        'temporaries': memory.temp_size_in_bytes,
    }


def kernels(text, told):
    """How often a lowered program calls cuDNN's attention; on a GPU it must, forward and back."""
    found = re.findall(r'custom_call @__cudnn\$fmha(\w+)', text)
    counts = {name: found.count(name) for name in sorted(set(found))}
    back = sum(name.endswith('Backward') for name in counts)
    if told['device'] == 'cuda' and not 0 < back < len(counts):
        raise AssertionError(f'attention is not that of cuDNN, forward and backward: {counts}')
    return counts


def our_product(size):
    """Two matrices in bfloat16 whose product is like the second, how to make it, how to wait."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0))
    a, x = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    return a / jnp.sqrt(jnp.bfloat16(size)), x, jax.jit(jnp.matmul), jax.block_until_ready


# Theirs ------------------------------------------------------------------------------------------


def their_model(told):
    """The model with adapters, whether these are in bfloat16, and all that is trained."""
    import peft
    import torch
    import transformers

    device, half = told['device'], torch.bfloat16
    fields = dict(told['fields'])
    config = transformers.AutoConfig.for_model(fields.pop('model_type'), **fields)
    with torch.device(device):
        make = transformers.AutoModelForCausalLM.from_config
        base = make(config, dtype=half, attn_implementation='sdpa')
    assert {(p.device.type, p.dtype) for p in base.parameters()} == {(device, half)}
    again = told['remat'] == 'full'
    if again:  # two names of one thing in transformers
        new, old = 'activation_checkpointing_enable', 'gradient_checkpointing_enable'
        getattr(base, new if hasattr(base, new) else old)({'use_reentrant': False})
    assert any(getattr(m, 'gradient_checkpointing', False) for m in base.modules()) == again
    lora = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LINEARS))
    narrow = told['side'] == 'torch-bfloat16'
    model = peft.get_peft_model(base, lora, autocast_adapter_dtype=not narrow).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {half if narrow else torch.float32}
    return model, narrow, trained


def theirs(told):
    import torch

    device, began = told['device'], time.perf_counter()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision('high')
    model, narrow, trained = their_model(told)
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=1e-4, fused=True)
    ids = torch.from_numpy(draw_ids(told)).long().to(device)
    cast = lambda: contextlib.nullcontext() if narrow else torch.autocast(device, torch.bfloat16)
    facts = {
        'phi': sum(p.numel() for p in trained),
        'loss_is': "the model's own",
        'weights_s': round(time.perf_counter() - began, 2),
        'attention': model.config._attn_implementation,
        'adapters': 'bfloat16' if narrow else 'float32, under autocast to bfloat16',
    }

    def step():
        optimizer.zero_grad()
        with cast():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    def wait(value):
        _finish(device)
        return float(value)

    def memory():
        if device != 'cuda':
            return {'peak_bytes': None}
        most = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return dict(zip(('peak_bytes', 'reserved_bytes'), most, strict=True))

    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()  # drawing weights is no part of a step
    return Side(step, wait, memory, facts)


def their_product(told):
    """As `our_product`."""
    import torch

    size, device = told['matrix'], told['device']
    a, x = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return a / size**0.5, x, torch.matmul, lambda _: _finish(device)


def _finish(device):
    """Waits for all that PyTorch was told to do."""
    import torch

    if device == 'cuda':
        torch.cuda.synchronize()
