"""Trainings that are killed or told to end at random moments, and go on (R1, R2)."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import NamedTuple

from faults_run import Run, logged

HERE = pathlib.Path(__file__).parent
CHAIN = 5
"""So often at most is one run killed."""

LIMIT = 300
"""Seconds that no process takes."""


class Count(NamedTuple):
    """What came of the cases of a fault.

    Attributes:
      passed: cases in which the promise was kept.
      cases: all of them.
      seen: what else was seen, for JSON.
    """

    passed: int
    cases: int
    seen: dict


class Cut(NamedTuple):
    """A process that was killed or told to end.

    Attributes:
      code: its exit code; minus the signal that ended it.
      seconds: from the signal to its end.
      sealed: from the signal to the newest checkpoint; 0 where there is none.
      began: the step that it went on from; None where it had not said so yet.
      logged: the last step in the log of losses.
      saved: the newest checkpoint that is whole, 0 for none.
      moment: what went on in the folder.
      said: what it complained of.
    """

    code: int
    seconds: float
    sealed: float
    began: int | None
    logged: int
    saved: int
    moment: str
    said: str


def environment(place: pathlib.Path) -> dict[str, str]:
    """One thread, this repository's library, and compiled programs kept between processes."""
    flags = os.environ.get('XLA_FLAGS', '') + ' --xla_cpu_multi_thread_eigen=false'
    return os.environ | {
        'PYTHONPATH': str(HERE.parent),
        'XLA_FLAGS': flags.strip(),
        'OMP_NUM_THREADS': '1',
        'JAX_PLATFORMS': 'cpu',
        'JAX_COMPILATION_CACHE_DIR': str(place / 'compiled'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    }


class End(NamedTuple):
    """A run that has come to its end.

    Attributes:
      digest: of its last state.
      began: the step that it went on from at last; None where it had not said so.
    """

    digest: str
    began: int | None


class Child:
    """A process that trains in a folder."""

    def __init__(self, place: pathlib.Path, folder: pathlib.Path, run: Run):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(HERE / 'faults_run.py'), str(folder)]
        command.append(json.dumps(dataclasses.asdict(run)))
        self.folder = folder
        self._errors = (folder / 'errors.txt').open('w')
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment(place)
        )

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def ready(self) -> int | None:
        """Waits until training begins; the step, or None where the process ended before."""
        return next((int(line[6:]) for line in self._process.stdout if line[:6] == 'ready '), None)

    def end(self) -> str:
        """Waits for the end; the digest of the last state.

        Raises:
          RuntimeError: it came to no good end.
        """
        out = self._rest()
        if self._process.returncode:
            raise RuntimeError(
                f'exit code {self._process.returncode} in {self.folder}: {self._complaint()}'
            )
        return out.split()[-1]

    def _rest(self) -> str:
        """What it still says until its end; `communicate` would lose what `ready` read ahead."""
        late = threading.Timer(LIMIT, self._process.kill)
        late.start()
        out = self._process.stdout.read()
        self._process.wait()
        late.cancel()
        self._errors.close()
        return out

    def _complaint(self) -> str:
        return (self.folder / 'errors.txt').read_text()[-2000:]

    def cut(self, sent: int, delay: float, began: int | None) -> Cut | End:
        """Sends a signal after a while, which a run that has come to its end does not hear."""
        time.sleep(delay)
        self._process.send_signal(sent)
        since = time.time()
        out = self._rest()
        seconds = time.time() - since
        if began is None:
            began = next((int(word) for word in out.split()[2:3]), None)
        if self._process.returncode == 0:
            return End(out.split()[-1], began)
        last, saved, moment = look(self.folder)
        seal = self.folder / f'checkpoints/steps/{saved}/manifest.json'
        sealed = max(seal.stat().st_mtime - since, 0) if seal.exists() else 0.0
        code, said = self._process.returncode, self._complaint()
        return Cut(code, seconds, sealed, began, last, saved, moment, said)


def look(folder: pathlib.Path) -> tuple[int, int, str]:
    """The last step logged, the newest one saved, and what goes on."""
    last = max((step for step, _ in logged(folder)), default=0)
    names = [path.name for path in (folder / 'checkpoints/steps').glob('*')]
    whole = [int(n) for n in names if (folder / f'checkpoints/steps/{n}/manifest.json').exists()]
    open_ = [int(name) for name in names if name.isdecimal() and int(name) not in whole]
    saved = max(whole, default=0)
    if any('tmp' in name for name in names):
        moment = 'writing'
    elif open_:
        moment = 'sealing' if max(open_) > saved else 'removing an old one'
    else:
        moment = 'between two checkpoints'
    return last, saved, moment


def unbroken(place: pathlib.Path, run: Run) -> tuple[str, list, float]:
    """How a run ends that nobody kills, its losses, and the seconds of its training."""
    Child(place, place / 'first', run).end()  # compiles, so that the next does not
    child = Child(place, place / 'unbroken', run)
    child.ready()
    since = time.monotonic()
    last = child.end()
    return last, logged(place / 'unbroken'), time.monotonic() - since


def chain(
    place: pathlib.Path, folder: pathlib.Path, run: Run, sent: int, most: int, window: float,
    draw: random.Random, early: float,
) -> tuple[list[Cut], End]:  # fmt: skip
    """A run that is cut off some times, then ends: how, and from where it went on at last."""
    cuts = []
    while len(cuts) < most:
        child = Child(place, folder, run)
        if draw.random() < early:
            cut = child.cut(sent, draw.uniform(0, 6), None)
        else:
            began = child.ready()
            cut = child.cut(sent, draw.uniform(0.05, 0.05 + window), began)
        if isinstance(cut, End):
            return cuts, cut
        cuts.append(cut)
    child = Child(place, folder, run)
    began = child.ready()
    return cuts, End(child.end(), began)


def went_on(cuts: list[Cut], end: End) -> list[int | None]:
    """From where the run went on after each cut."""
    return [*(cut.began for cut in cuts), end.began][1:]


def tell(cuts: list[Cut]) -> dict:
    """Moments of all cuts, and how much was done once more."""
    again = [cut.logged - cut.saved for cut in cuts]
    return {'moments': dict(Counter(cut.moment for cut in cuts)), 'most_steps_redone': max(again)}


def killed(place: pathlib.Path, kills: int, seed: int, waited: bool) -> Count:
    """R1, half of it: `kill -9` while checkpoints are waited for, or written beside the steps.

    What is done once more is at most one interval, and what is done while a checkpoint is written.
    """
    run = Run(waited=waited, pause=0.03)
    last, log, seconds = unbroken(place, run)
    draw, cuts, odd, number = random.Random(seed), [], [], 0
    most = run.every if waited else 2 * run.every
    while len(cuts) < kills:
        number, most_now = number + 1, min(CHAIN, kills - len(cuts))
        folder, window = place / f'run{number}', 1.6 * seconds / (CHAIN + 1)
        found, end = chain(place, folder, run, signal.SIGKILL, most_now, window, draw, early=0.2)
        starts = went_on(found, end)
        right = end.digest == last and logged(folder) == log
        for cut, start in zip(found, starts, strict=True):
            good = right and start in (cut.saved, None) and cut.logged - cut.saved <= most
            if not good or cut.code != -signal.SIGKILL:
                odd.append({**cut._asdict(), 'went_on_from': start, 'right': right})
        cuts += found
    seen = {'runs': number, 'save_every': run.every, **tell(cuts), 'odd': odd}
    return Count(len(cuts) - len(odd), len(cuts), seen)


def told_to_end(place: pathlib.Path, cases: int, seed: int) -> Count:
    """R2: SIGTERM, with a phi of 10 MB and AdamW's 20 MB."""
    run = Run(width=2048, rank=640, steps=40, every=15, pause=0.02)
    last, log, seconds = unbroken(place, run)
    draw, cuts, passed, number = random.Random(seed), [], 0, 0
    while len(cuts) < cases:
        number, most = number + 1, min(CHAIN, cases - len(cuts))
        folder, window = place / f'run{number}', 1.2 * seconds / (CHAIN + 1)
        found, end = chain(place, folder, run, signal.SIGTERM, most, window, draw, early=0.0)
        starts = went_on(found, end)
        right = end.digest == last and logged(folder) == log
        for cut, start in zip(found, starts, strict=True):
            good = right and cut.code == 143 and cut.sealed <= 5
            passed += good and start == cut.saved == cut.logged
        cuts += found
    seen = {
        'runs': number,
        'median_checkpoint_s': round(statistics.median(cut.sealed for cut in cuts), 2),
        'slowest_checkpoint_s': round(max(cut.sealed for cut in cuts), 2),
        'slowest_end_s': round(max(cut.seconds for cut in cuts), 2),
        'exit_codes': dict(Counter(str(cut.code) for cut in cuts)),
    }
    return Count(passed, len(cuts), seen)
