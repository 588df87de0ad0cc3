"""Faults that a training must survive: R1, R2, R4, R5, R7, R12, R13, R19, R20, R21; many of each.

    python benchmarks/faults.py [--only R1,R7,train] [--quick] [--seed 0]
        [--out benchmarks/results/faults.json]

Children are trained on one CPU thread, killed or told to end at moments drawn from the seed, and
go on; what they end with is compared, bit for bit, with a run that nobody touched. `train` does so
with the default task of `peftjax tune`, `mesh` with the same on eight devices. Rows of an earlier
call stay in the file where `--only` leaves them out. The exit code is 1 where a promise was not
kept.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import faults_disks as disks
import faults_kills as kills
import faults_states as states
import faults_training as training
import faults_tune as tune
from faults_kills import Count

from peftjax.cli._report import versions

OUT = kills.HERE / 'results/faults.json'
Case = Callable[[pathlib.Path, bool, int], Count]

CASES: dict[str, tuple[str, Case]] = {
    'R1 waited': (
        'kill -9, each checkpoint waited for',
        lambda place, quick, seed: kills.killed(place, 2 if quick else 25, seed, True),
    ),
    'R1 beside': (
        'kill -9, checkpoints written beside the steps',
        lambda place, quick, seed: kills.killed(place, 2 if quick else 25, seed + 1, False),
    ),
    'R2': (
        'SIGTERM in mid step, phi of 10 MB',
        lambda place, quick, seed: kills.told_to_end(place, 1 if quick else 20, seed),
    ),
    'R4': (
        'state taken up after every step, four sources',
        lambda place, quick, seed: states.every_step(place, 5 if quick else 40),
    ),
    'R5': (
        'going on with another data set, sampler, seed, worker count',
        lambda place, quick, seed: states.another_stream(place),
    ),
    'R7': (
        'each file of the newest checkpoint deleted, cut, flipped',
        lambda place, quick, seed: states.damaged(place, 2 if quick else None),
    ),
    'R12': (
        'one step of every method: phi changes, theta does not',
        lambda place, quick, seed: training.one_step(2 if quick else None),
    ),
    'R13': (
        'NaN or Inf in data, loss, gradient, optimizer, evaluation',
        lambda place, quick, seed: training.not_finite(place, quick),
    ),
    'R19': (
        'disk full, read-only, files limited, permission lost',
        lambda place, quick, seed: disks.disks(place),
    ),
    'R20': (
        'host memory while a phi of 1 GB is saved',
        lambda place, quick, seed: disks.memory(place, 300 if quick else 1000),
    ),
    'R21': (
        'two writers on one run folder',
        lambda place, quick, seed: disks.writers(place),
    ),
    'train': (
        'peftjax tune, killed ten times, against the unbroken run',
        lambda place, quick, seed: tune.killed(place, 1 if quick else 10, seed),
    ),
    'mesh': (
        'the same on eight host devices, --mesh data=2,fsdp=2,model=2',
        lambda place, quick, seed: tune.killed(place, 1 if quick else 10, seed, *tune.MESH),
    ),
    'processes': (
        'the same in two processes of four devices each',
        lambda place, quick, seed: tune.killed(place, 1 if quick else 10, seed, *tune.PROCESSES),
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--only', help='comma-separated, such as R1,train; all of them')
    parser.add_argument('--quick', action='store_true', help='few cases of each')
    parser.add_argument('--seed', type=int, default=0, help='of the moments (%(default)s)')
    parser.add_argument('--out', type=pathlib.Path, default=OUT, help='a JSON file (%(default)s)')
    options = parser.parse_args()
    only = options.only.split(',') if options.only else list(CASES)
    if unknown := [one for one in only if not any(name.split()[0] == one for name in CASES)]:
        parser.error(f'no fault {unknown[0]!r}; there are {", ".join(CASES)}')
    wanted = [name for name in CASES if {name, name.split()[0]} & set(only)]
    rows = [counted(name, options.quick, options.seed) for name in wanted]
    write(options.out, rows)
    return int(any(row['passed'] < row['cases'] for row in rows))


def counted(name: str, quick: bool, seed: int) -> dict:
    """One fault, in a folder of its own."""
    about, case = CASES[name]
    since = time.monotonic()
    with tempfile.TemporaryDirectory(prefix='faults-') as folder:
        passed, cases, seen = case(pathlib.Path(folder), quick, seed)
    row = {
        'fault': name,
        'about': about,
        'passed': passed,
        'cases': cases,
        'seconds': round(time.monotonic() - since, 1),
        'seen': seen,
        'quick': quick,
        'load': round(os.getloadavg()[0], 1),  # of the machine, where others work too
        'seed': seed,
        'date': datetime.date.today().isoformat(),
        'versions': versions() | {
            name: importlib.metadata.version(name) for name in ('orbax-checkpoint', 'grain')
        },
    }  # fmt: skip
    mark = '' if passed == cases else '  NOT KEPT'
    print(f'{name:10} {passed:4} of {cases:4}  {row["seconds"]:7.1f} s  {about}{mark}', flush=True)
    print(f'           {json.dumps(seen)[:2000]}', flush=True)
    return row


def write(out: pathlib.Path, rows: list[dict]) -> None:
    """Puts rows in place of earlier ones of the same faults."""
    found = {row['fault']: row for row in json.loads(out.read_text())} if out.exists() else {}
    found |= {row['fault']: row for row in rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([found[name] for name in CASES if name in found], indent=1) + '\n')


if __name__ == '__main__':
    sys.exit(main())
