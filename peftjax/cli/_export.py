"""`peftjax export`: an adapter in the format of Hugging Face PEFT."""

import argparse
import json

import peftjax as pj
from peftjax.cli import _adapters, _saved
from peftjax.cli._terminal import say


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    _adapters.check_absent(options.out, options.overwrite)
    loaded = _adapters.open_adapter(options.adapter)
    about = loaded.metadata
    folder = pj.hf.save_adapter(
        options.out,
        loaded.peft,
        loaded.phi,
        base_model=options.base_model or str(about['model']),
        task_type=_adapters.TASKS[about['task']],
        overwrite=options.overwrite,
    )
    config = json.loads((folder / 'adapter_config.json').read_text(encoding='utf-8'))
    say(f'{config["peft_type"]} over {config["base_model_name_or_path"]}; written to {options.out}')
    if about['task'] != _saved.LANGUAGE:
        say('its classifier reads the mean of the tokens; that of transformers reads otherwise')
    return 0
