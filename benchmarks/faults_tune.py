"""The default task of `peftjax tune`, killed at random moments and taken up each time."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
from faults_kills import LIMIT, Count, environment
from faults_run import bits

from peftjax import checkpoint

TASK = ('tune', '--shots', '10', '--eval-part', '0.1', '--evaluations', '4', '--save-every', '5')
"""LoRA on MiniLM, eight epochs of ten messages of each of seven labels: 72 steps of eight."""

MESH = ('--mesh', 'data=2,fsdp=2,model=2')
PROCESSES = (*MESH, '--processes', '2')

SAME = ('options.toml', 'loss.png', 'adapter/adapter.json')
"""Files that must have the same bytes. Orbax gives its files names of their own and writes times
into them, so phi is compared as arrays; `metrics.jsonl` has seconds, which are left out."""


def killed(place: pathlib.Path, kills: int, seed: int, *more: str) -> Count:
    """One run that is killed so often, against one that is not; a case is a kill."""
    finish(start(place, place / 'first', *more))  # compiles, so that the next do not
    since = time.monotonic()
    finish(start(place, place / 'unbroken', *more))
    whole, training = time.monotonic() - since, rows(place / 'unbroken')[-1]['seconds']
    draw, moments, killed_are, out = random.Random(seed), [], [], place / 'killed'
    steps = max(row['step'] for row in rows(place / 'unbroken'))
    for step in sorted(draw.sample(range(steps - 5), kills)):
        child = start(place, out, *more)
        if draw.random() < 0.8:  # else at any moment, those before training included
            wait_for(child, out, step)
            time.sleep(draw.uniform(0, 3 * training / steps))
        else:
            time.sleep(draw.uniform(0, whole / 2))
        killed_are.append(kill(child, draw))
        moments.append(max((row['step'] for row in rows(out)), default=0))
    finish(start(place, out, *more))
    different = compare(place / 'unbroken/run', out / 'run')
    seen = {
        'seconds_unbroken': round(whole, 1),
        'killed_after_steps': moments,
        'killed': killed_are,
    }
    return Count(0 if different else len(moments), kills, {**seen, 'different': different})


def start(place: pathlib.Path, home: pathlib.Path, *more: str) -> subprocess.Popen:
    """Begins the run in a folder, or goes on with it."""
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, '-m', 'peftjax', *TASK, *more, '--out', 'run', '--resume']
    with (home / 'said.txt').open('a') as said:
        return subprocess.Popen(
            command, cwd=home, env=environment(place), stdout=said, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def finish(child: subprocess.Popen, *codes: int) -> None:
    """Waits for the end.

    Raises:
      RuntimeError: it is another than it should be: 0, if nothing else is said.
    """
    if (code := child.wait(LIMIT)) not in (codes or (0,)):
        raise RuntimeError(f'{child.args} ended with {code}')


def kill(child: subprocess.Popen, draw: random.Random) -> str:
    """Kills the command, one of the processes that it has started, or all of them at once.

    Returns:
      What was killed.
    """
    file = pathlib.Path(f'/proc/{child.pid}/task/{child.pid}/children')
    started = [int(word) for word in file.read_text().split()] if file.exists() else []
    victim = draw.randrange(-1 - bool(started), len(started))
    if victim < 0:
        os.killpg(child.pid, signal.SIGKILL) if victim == -2 else child.kill()
        finish(child, -signal.SIGKILL)
        return 'all' if victim == -2 else 'the command'
    os.kill(started[victim], signal.SIGKILL)
    finish(child, 128 + signal.SIGKILL, 128 + signal.SIGABRT)  # the other's end may be seen first
    return f'process {victim}'


def rows(home: pathlib.Path) -> list[dict]:
    """What the run has measured so far."""
    file = home / 'run/metrics.jsonl'
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith('}')]


def wait_for(child: subprocess.Popen, home: pathlib.Path, step: int) -> None:
    """Until the run, which writes its log anew where it goes on, has made so many steps."""
    file = home / 'run/metrics.jsonl'
    stamp = lambda: file.stat().st_mtime_ns if file.exists() else 0
    first = stamp()
    made = lambda: max((row['step'] for row in rows(home)), default=-1)
    while (stamp() == first or made() < step) and child.poll() is None:
        time.sleep(0.05)


def compare(whole: pathlib.Path, other: pathlib.Path) -> list[str]:
    """What differs between two folders of runs."""
    names = [{path.name for path in run.iterdir()} for run in (whole, other)]
    wrong = ['names of files'] if names[0] != names[1] else []
    wrong += [name for name in SAME if (whole / name).read_bytes() != (other / name).read_bytes()]
    log = [
        [{k: v for k, v in row.items() if k != 'seconds'} for row in rows(run.parent)]
        for run in (whole, other)
    ]
    phi = [checkpoint.load(run / 'adapter').phi for run in (whole, other)]
    wrong += ['metrics.jsonl'] if log[0] != log[1] else []
    same = bits(phi[0]) == bits(phi[1]) and jax.tree.structure(phi[0]) == jax.tree.structure(phi[1])
    return wrong if same else [*wrong, 'phi']
