"""What the commands on folders and shapes take."""

import argparse
from typing import Any

from peftjax.cli._numbers import count

DTYPES = ('float32', 'bfloat16', 'float16')


def plan(commands: Any) -> None:
    """`peftjax plan`."""
    about = 'plan the tuning of a decoder from its shapes: parameters, bytes, FLOPs; no weights'
    sub = commands.add_parser('plan', help=about, description=about)
    sub.add_argument('--model', required=True, help='folder with a config.json, or such a file')
    sub.add_argument(
        '--method',
        default='lora',
        help='lora, dora, ia3, adapter, prompt, prefix, bitfit, norms or full (%(default)s)',
    )
    sub.add_argument('--rank', type=count, default=16, help='of lora and dora (%(default)s)')
    sub.add_argument('--target', help='regex of paths, for lora, dora and ia3 (all linear layers)')
    sub.add_argument('--batch', type=count, default=8, help='rows of one step (%(default)s)')
    sub.add_argument('--length', type=count, default=2048, help='tokens of a row (%(default)s)')
    sub.add_argument(
        '--mesh',
        type=_mesh,
        default={},
        help='devices by axis, as data=4,model=2: data splits batches, model splits products, '
        'fsdp splits batches and keeps a part of each weight (one device)',
    )
    sub.add_argument(
        '--dtype', choices=DTYPES, default='bfloat16', help='of the model (%(default)s)'
    )
    sub.add_argument(
        '--quantize', choices=('nf4', 'int4', 'int8'), help='quantize all linear layers (none)'
    )
    sub.add_argument(
        '--optimizer',
        choices=('adamw', 'adafactor', 'lion', 'sgd'),
        default='adamw',
        help='whose state is counted (%(default)s)',
    )
    sub.add_argument(
        '--remat',
        choices=('none', 'names', 'full'),
        default='names',
        help='what a gradient keeps of each layer: everything, the results of large products, or '
        'its input alone (%(default)s)',
    )


def _mesh(text: str) -> dict[str, int]:
    axes: dict[str, int] = {}
    for part in text.split(','):
        name, _, size = part.strip().partition('=')
        if name not in ('data', 'fsdp', 'model') or name in axes:
            raise argparse.ArgumentTypeError(
                f'must be different axes among data, fsdp and model, as data=4,model=2; got {text!r}'
            )
        axes[name] = count(size)
    return axes
