"""What the commands on folders and shapes take."""

import argparse
from typing import Any

from peftjax.cli import _mesh, _method_options
from peftjax.cli._named import Named
from peftjax.cli._numbers import count
from peftjax.cli.language._options import DTYPES, EMBEDDINGS, QUANTIZED


def plan(commands: Any) -> None:
    """`peftjax plan`."""
    about = 'plan the tuning of a decoder from its shapes: parameters, bytes, FLOPs; no weights'
    sub = commands.add_parser('plan', help=about, description=about)
    sub.add_argument(
        '--model', action=Named, required=True, help='folder with a config.json, or such a file'
    )
    sub.add_argument(
        '--method', default='lora', help='as of tune --method, which lists them (%(default)s)'
    )
    _method_options.add(sub)
    sub.add_argument('--batch', type=count, default=8, help='rows of one step (%(default)s)')
    sub.add_argument('--length', type=count, default=2048, help='tokens of a row (%(default)s)')
    sub.add_argument(
        '--mesh',
        type=_mesh.axes,
        default={},
        help=_mesh.ABOUT,
    )
    sub.add_argument(
        '--dtype', choices=DTYPES, default='bfloat16', help='of the model (%(default)s)'
    )
    sub.add_argument('--quantize', choices=QUANTIZED, help='quantize all linear layers (none)')
    sub.add_argument('--embeddings', action='store_true', help=EMBEDDINGS)
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


def merge(commands: Any) -> None:
    """`peftjax merge`."""
    about = 'fold an adapter into its decoder and write a folder that transformers reads'
    sub = commands.add_parser('merge', help=about, description=about)
    _adapter(sub)
    sub.add_argument(
        '--out', action=Named, required=True, help='folder for the model; nothing may be there yet'
    )
    sub.add_argument('--dtype', choices=DTYPES, help="of the weights written (the model's)")
    sub.add_argument(
        '--model', action=Named, help='folder or hub name of the model, where it has moved'
    )
    sub.add_argument('--any-base', action='store_true', help='take a model of other weights')
    sub.add_argument(
        '--dequantize',
        action='store_true',
        help='merge into the rounded weights of a quantized model',
    )


def export(commands: Any) -> None:
    """`peftjax export`."""
    about = 'write an adapter as Hugging Face PEFT or AdapterHub reads it'
    sub = commands.add_parser('export', help=about, description=about)
    _adapter(sub)
    sub.add_argument(
        '--out', action=Named, required=True, help='folder for the adapter of the other library'
    )
    sub.add_argument(
        '--format', choices=('peft', 'adapterhub'), default='peft', help='of it (%(default)s)'
    )
    sub.add_argument(
        '--base-model',
        action=Named,
        help='what it is loaded over: a folder or hub name (the model it is of)',
    )
    sub.add_argument('--overwrite', action='store_true', help='replace an earlier export in --out')


def import_(commands: Any) -> None:
    """`peftjax import`."""
    about = 'make an adapter of one that PEFT or AdapterHub wrote, over a decoder'
    sub = commands.add_parser('import', help=about, description=about)
    sub.add_argument(
        'folder', action=Named, help='with adapter_config.json and tensors in safetensors'
    )
    sub.add_argument(
        '--model', action=Named, required=True, help='folder or hub name of the decoder'
    )
    sub.add_argument('--out', action=Named, required=True, help='folder for the adapter')
    sub.add_argument(
        '--max-tokens', type=count, default=1024, help='longer texts are cut (%(default)s)'
    )
    sub.add_argument(
        '--lenient',
        action='store_true',
        help='list keys and tensors that are not known, instead of refusing them',
    )
    sub.add_argument('--overwrite', action='store_true', help='replace an earlier adapter in --out')


def quantize(commands: Any) -> None:
    """`peftjax quantize`."""
    about = 'write a decoder with quantized weights, which all commands take as a model'
    sub = commands.add_parser('quantize', help=about, description=about)
    sub.add_argument('model', action=Named, help='folder or hub name of the decoder')
    sub.add_argument(
        '--out', action=Named, required=True, help='folder for the model; nothing may be there yet'
    )
    sub.add_argument(
        '--scheme', choices=QUANTIZED, default='nf4', help='of 4, 4 or 8 bits (%(default)s)'
    )
    sub.add_argument('--target', help='regex of the paths to quantize (all linear layers)')
    sub.add_argument('--embeddings', action='store_true', help=EMBEDDINGS)


def _adapter(sub: argparse.ArgumentParser) -> None:
    sub.add_argument('adapter', action=Named, help='folder that tune or import left')


COMMANDS = (plan, merge, export, import_, quantize)
"""Each adds one command."""
