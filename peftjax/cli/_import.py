"""`peftjax import`: an adapter of Hugging Face PEFT or AdapterHub, over a decoder."""

import argparse
import pathlib
from typing import Any

import peftjax as pj
from peftjax.cli import _adapters, _saved
from peftjax.cli._opened import is_adapter, kind
from peftjax.cli._terminal import say
from peftjax.hf._stacked import LayersDifferError


def _check(folder: pathlib.Path) -> None:
    """Refuses what another library did not write, before a model is read."""
    if not folder.is_dir():
        raise FileNotFoundError(f'no such folder: {folder}')
    if (folder / 'adapter_config.json').exists():
        return
    is_ours = 'This one is an adapter of peftjax already'
    raise ValueError(
        f'{folder} must hold adapter_config.json, as PEFT and AdapterHub write it. '
        f'{is_ours if is_adapter(folder) else kind(folder)}'
    )


def _read(options: argparse.Namespace) -> tuple[Any, pj.hf.LoadedAdapter]:
    """The parameters of the base, and the adapter over it."""
    try:
        return _over(options, scan_layers=True)
    except LayersDifferError:
        pass  # the error holds the first base, and goes before the second is read
    return _over(options, scan_layers=False)


def _over(options: argparse.Namespace, scan_layers: bool) -> tuple[Any, pj.hf.LoadedAdapter]:
    """The same, the layers of the base as one stack or each by itself."""
    base, ids = _adapters.load_base(options.model, scan_layers), _adapters.IDS
    how = {'position_ids': ids, 'strict': not options.lenient}
    return base.params, pj.hf.load_adapter(
        options.folder, base.model.apply_fn, base.params, ids, **how
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    _adapters.check_absent(options.out, options.overwrite)
    _check(pathlib.Path(options.folder).expanduser())
    params, found = _read(options)
    metadata = {
        'task': _saved.LANGUAGE,
        'model': _saved.lasting(options.model),
        'max_tokens': options.max_tokens,
        'method': found.kind.lower(),
        'seed': None,
        'settings': {},
    }
    pj.save(
        options.out,
        found.peft,
        found.phi,
        params=params,
        metadata=metadata,
        overwrite=options.overwrite,
    )
    say(str(found.peft))
    if found.unused:
        say(f'without effect on a trained adapter: {", ".join(found.unused)}')
    say(f'{found.kind} over {options.model}; written to {options.out}')
    return 0
