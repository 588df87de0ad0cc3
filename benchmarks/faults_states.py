"""States and streams taken up at every step, by another run, from damaged files (R4, R5, R7)."""

import logging
import pathlib
import shutil
from typing import Any

import grain
from faults_kills import Count
from faults_run import Run, bits

import peftjax as pj

SOURCES = {
    'Batches': Run(),
    'Batches, accumulate=2': Run(accumulate=2),
    'Batches, in the middle of optax.MultiSteps(3)': Run(hold=3),
    'grain iterator': Run(),
}
"""Each with a shuffle of its own in every epoch, whose last batch is not full."""


def source(name: str, run: Run) -> Any:
    """A fresh iterator."""
    if 'grain' not in name:
        return run.stream()
    rows = run.rows()
    order = grain.MapDataset.range(len(rows)).shuffle(seed=0)
    batches = order.batch(2, batch_fn=lambda index: rows.batch(index, 2))
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(batches.repeat(run.steps).to_iter_dataset(options))


def noted(run: Run, state: Any, batches: Any, steps: int, **how: Any) -> list:
    """What follows: each batch and each loss, bit for bit, then the last state."""
    seen = []

    class Noting:
        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            seen.append(bits(batch := next(batches)))
            return batch

        def __getattr__(self, name: str) -> Any:
            return getattr(batches, name)

    on_loss = lambda step, loss: seen.append((step, loss))
    last = pj.fit(run.step, run.params, state, Noting(), steps=steps, on_loss=on_loss, **how)
    batches_seen = [one for one in seen if isinstance(one, list)]
    return [batches_seen, [one for one in seen if isinstance(one, tuple)], bits(last)]


def every_step(place: pathlib.Path, steps: int) -> Count:
    """R4: after each step of a short run the state is read again, and all that follows compared."""
    passed, seen = 0, {}
    for name, run in SOURCES.items():
        with run.checkpoints(place / name.replace(' ', '_'), keep=steps) as saved:
            fresh = run.fresh()
            whole = noted(run, fresh, source(name, run), steps, checkpoints=saved, save_every=1)
            good = [taken_up(run, name, saved, step, whole, steps) for step in saved.steps()]
        passed, seen[name] = passed + sum(good), f'{sum(good)} of {steps}'
    return Count(passed, steps * len(SOURCES), seen)


def taken_up(run: Run, name: str, saved: Any, step: int, whole: list, steps: int) -> bool:
    """Whether a run that goes on after one step is the rest of the whole one."""
    restored, batches = saved.restore(run.fresh(), step=step), source(name, run)
    (batches.restore if hasattr(batches, 'restore') else batches.set_state)(restored.data)
    rest = noted(run, restored.state, batches, steps)
    return rest == [whole[0][step:], whole[1][step:], whole[2]]


def another_stream(place: pathlib.Path) -> Count:
    """R5: other data, another sampler, another seed, another count of workers."""
    run, more, workers = Run(), Run(examples=8), {'seed': 0, 'workers': 0}
    both = (run.rows().fingerprint(), more.rows().fingerprint())
    with run.checkpoints(place, settings=workers) as saved:
        noted(run, run.fresh(), run.stream(), 5, checkpoints=saved)

    def goes_on(batches: Any, settings: dict = workers, **options: Any) -> None:
        with run.checkpoints(place, settings=settings, **options) as saved:
            saved.resume(run.fresh(), batches)

    others = {'seed': 0, 'workers': 2}
    ask = {
        'data set': (goes_on, (more.stream(),), both),
        'sampler': (goes_on, (run.stream(size=3),), ('size was 2 and is 3',)),
        'seed': (goes_on, (run.stream(seed=1),), ('seed was 0 and is 1',)),
        'workers': (goes_on, (run.stream(), others), ('workers was 0 and is 2',)),
    }
    seen = {name: refused(*case) for name, case in ask.items()}
    goes_on(run.stream(), others, other_settings=('workers',))  # said outright
    passed = sum(said[0] for said in seen.values())
    return Count(
        passed,
        len(ask),
        {name: said[1].replace(str(place), 'FOLDER') for name, said in seen.items()},
    )


def refused(call: Any, arguments: tuple, wanted: tuple[str, ...]) -> tuple[bool, str]:
    """Whether a call is refused and says all that is wanted; what it says."""
    try:
        call(*arguments)
    except ValueError as error:
        return all(one in str(error) for one in wanted), str(error)
    return False, 'accepted'


HOW = ('deleted', 'cut', 'flipped')


def damaged(place: pathlib.Path, most: int | None = None) -> Count:
    """R7: each file of the newest checkpoint deleted, cut by a byte, and with one bit flipped."""
    run, passed, cases, seen = Run(), 0, 0, {'detected': 0, 'as if never finished': 0}
    with run.checkpoints(place / 'run', keep=9) as saved:
        noted(run, run.fresh(), run.stream(), 10, checkpoints=saved, save_every=5)
        earlier = saved.restore(run.fresh(), step=5)
    newest = place / 'run/steps/10'
    files = [path.relative_to(newest) for path in sorted(newest.rglob('*')) if path.is_file()]
    for file in files[:most]:
        for how in HOW:
            if how != 'deleted' and not (newest / file).stat().st_size:
                continue
            found = detected(place, run, file, how, bits(earlier.state))
            cases, passed = cases + 1, passed + (found in seen)
            seen[found] = seen.get(found, 0) + 1
    return Count(passed, cases, {'files': len(files[:most]), **seen})


def detected(place: pathlib.Path, run: Run, file: pathlib.Path, how: str, earlier: list) -> str:
    """How one damage is met."""
    folder, notes = place / 'copy', Notes()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place / 'run', folder)
    damage(folder / 'steps/10' / file, how)
    logger = logging.getLogger('peftjax')
    logger.addHandler(notes)
    try:
        with run.checkpoints(folder, keep=9) as saved:
            try:
                restored, name = saved.restore(run.fresh()), 'as if never finished'
            except pj.CheckpointError as error:
                if str(folder / 'steps/10') not in str(error):
                    return 'the file is not named'
                restored, name = saved.restore(run.fresh(), fall_back=True), 'detected'
    finally:
        logger.removeHandler(notes)
    if bits(restored.state) != earlier:
        return 'another state was taken'
    return name if any('step 10' in said for said in notes.said) else 'nothing was logged'


class Notes(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a message."""
        self.said.append(record.getMessage())


def damage(path: pathlib.Path, how: str) -> None:
    """Deletes a file, cuts its last byte, or flips a bit in its middle."""
    content = bytearray(path.read_bytes())
    if how == 'deleted':
        path.unlink()
    elif how == 'cut':
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
