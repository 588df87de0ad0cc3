"""Disks that take no more, the memory that saving takes, two writers (R19, R20, R21)."""

import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
from typing import Any

import numpy as np
from faults_kills import HERE, LIMIT, Child, Count, environment
from faults_run import Run, bits

import peftjax as pj

SIZE = '3m'
"""Of a disk that three checkpoints fill."""

MOUNTED = ('full', 'read-only')
DISKS = (*MOUNTED, 'limit on the size of files', 'permission lost')


def disks(place: pathlib.Path) -> Count:
    """R19: each in a process of its own, on a small file system that goes with it.

    A quota needs tools that are rarely there; in its place the system limits the size of files.
    """
    seen = {how: alone(place, 'disk', how) for how in DISKS}
    made = {how: said for how, said in seen.items() if not said.startswith('not made')}
    return Count(sum(said == 'kept' for said in made.values()), len(made), seen)


def alone(place: pathlib.Path, what: str, *arguments: str) -> str:
    """What a process of its own says at its end."""
    apart = ['unshare', '--mount'] if arguments[0] in MOUNTED else []
    command = [*apart, sys.executable, str(HERE / 'faults_disks.py'), what, str(place), *arguments]
    ran = subprocess.run(
        command, capture_output=True, text=True, env=environment(place), timeout=LIMIT
    )
    if ran.returncode and 'unshare: ' in ran.stderr:
        return f'not made here: {ran.stderr.strip()[-200:]}'
    return ran.stdout.strip().splitlines()[-1] if ran.stdout.strip() else ran.stderr[-500:]


def disk(place: pathlib.Path, how: str) -> str:
    """What becomes of a run whose disk takes no more after its first checkpoints."""
    run, folder = Run(width=128, rank=64, examples=3), place / how.replace(' ', '-')
    folder.mkdir(parents=True, exist_ok=True)
    if how not in MOUNTED:
        return filled(run, folder, how)
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={SIZE}', 'tmpfs', str(folder)]
    made = subprocess.run(mount, capture_output=True, text=True)
    if made.returncode:
        return f'not made here: {made.stderr.strip()[-200:]}'
    try:
        return filled(run, folder, how)
    finally:
        subprocess.run(['umount', '--lazy', str(folder)], check=False)


def filled(run: Run, folder: pathlib.Path, how: str) -> str:
    """Saves until it cannot be; what is left on the disk and in memory."""
    state, batches, written = run.fresh(), run.stream(), []
    saved = run.checkpoints(folder / 'run', keep=50)
    error = None
    try:
        for step in range(1, 51):
            state, _ = run.step(run.params, state, next(batches))
            if step == 3:
                saved.restore(run.fresh())
                spoil(folder, how)
            before = bits(state)
            saved.save(state, batches.state())
            saved.wait()
            written.append(before)
    except OSError as caught:
        error = caught
    mend(folder, how)
    if error is None:
        return 'nothing was refused'
    if str(folder / 'run') not in str(error) or 'bytes)' not in str(error):
        return f'path or bytes are not named: {error}'
    if bits(state) != before:
        return 'the state in memory is another'
    return left(run, folder, saved, written, error)


def left(run: Run, folder: pathlib.Path, saved: Any, written: list, error: OSError) -> str:
    """What is found on the disk, once it takes something again."""
    steps, state = saved.steps(), run.fresh()
    if steps != list(range(1, len(written) + 1)):
        return f'{steps} are there, {len(written)} were written'
    whole = [bits(saved.restore(state, step=step).state) == written[step - 1] for step in steps]
    saved.close()
    if not all(whole):
        return 'an earlier checkpoint is another'
    kept = {str(step) for step in steps}
    odd = [path.name for path in (folder / 'run/steps').iterdir() if path.name not in kept]
    return f'left over: {odd}; {error}' if odd else 'kept'


def spoil(folder: pathlib.Path, how: str) -> None:
    """Makes the disk refuse what comes."""
    if how == 'full':
        free = shutil.disk_usage(folder).free
        (folder / 'other').write_bytes(bytes(max(free - 100_000, 0)))
    elif how == 'read-only':
        for how in ('--bind', str(folder)), ('-o', 'remount,bind,ro'):
            subprocess.run(['mount', *how, str(folder)], check=True)
    elif how == 'permission lost':
        for path in (folder, *folder.rglob('*')):
            path.chmod(0o555 if path.is_dir() else 0o444)
        if os.geteuid() == 0:  # who may do everything is not asked for permission
            os.seteuid(65534)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))


def mend(folder: pathlib.Path, how: str) -> None:
    """Makes the disk take things again."""
    if how == 'full':
        (folder / 'other').unlink()
    elif how == 'read-only':
        subprocess.run(['umount', str(folder)], check=True)
    elif how == 'permission lost':
        if os.getuid() == 0:
            os.seteuid(0)
        for path in (folder, *folder.rglob('*')):
            path.chmod(0o755 if path.is_dir() else 0o644)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


def memory(place: pathlib.Path, megabytes: int) -> Count:
    """R20: a phi of a gigabyte, as large as theta, through `Checkpoints` and through `save`."""
    seen = {}
    for how in ('checkpoint', 'adapter'):
        seen[how] = json.loads(alone(place / how, 'memory', how, str(megabytes)))
    good = [one['extra'] <= 1.3 and one['written'] <= 1.01 for one in seen.values()]
    return Count(sum(good), len(good), seen)


def saving(place: pathlib.Path, how: str, megabytes: int) -> dict[str, float]:
    """What saving takes in memory and on the disk, in times of phi."""
    import jax

    save(place / 'small', how, *made(8))  # what the first saving of all loads is not counted
    peft, params, state = made(megabytes * 250_000)  # of four bytes
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.phi))
    jax.block_until_ready((params, state))  # until then no memory was taken
    before = status('VmRSS')
    pathlib.Path('/proc/self/clear_refs').write_text('5')  # the peak begins anew
    save(place / 'saved', how, peft, params, state)
    peak = status('VmHWM')
    files = sum(path.stat().st_size for path in (place / 'saved').rglob('*') if path.is_file())
    shutil.rmtree(place / 'saved')
    times = lambda count: round(count / size, 3)
    return {'phi_bytes': size, 'extra': times(peak - before), 'written': times(files)}


def made(count: int) -> tuple[pj.Peft, Any, pj.TrainState]:
    """A plan that trains all of theta, theta of so many numbers, and a state."""
    import jax
    import jax.numpy as jnp
    import optax

    params = {'kernel': jnp.ones((8, count // 8))}
    x = jax.ShapeDtypeStruct((1, 8), jnp.float32)
    method = pj.Trainable(target='kernel')
    peft = pj.attach(method, lambda params, x: x @ params['kernel'], params, x)
    values = np.random.default_rng(0).random((8, count // 8), 'f4')
    phi = {'kernel': {'value': jnp.asarray(values)}}
    return peft, params, pj.start(optax.sgd(0.1), phi, jax.random.key(0))


def save(folder: pathlib.Path, how: str, peft: pj.Peft, params: Any, state: pj.TrainState) -> None:
    """Saves phi in one of the two ways."""
    if how == 'adapter':
        pj.save(folder, peft, state.phi, params=params)
        return
    with pj.Checkpoints(folder, peft, params) as saved:
        saved.save(state)


def status(name: str) -> int:
    """Bytes that the kernel tells of this process."""
    lines = pathlib.Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f'{name}:'))


def writers(place: pathlib.Path) -> Count:
    """R21: a second writer beside one that lives, and after one that was killed."""
    run = Run(pause=0.2)
    child = Child(place, place / 'run', run)
    child.ready()
    folder, seen = place / 'run/checkpoints', {}
    try:
        run.checkpoints(folder).close()
        seen['beside one that lives'] = 'accepted'
    except BlockingIOError as error:
        named = f'process {child.pid} of' in str(error)
        seen['beside one that lives'] = 'refused' if named else f'not named: {error}'
    child.cut(signal.SIGKILL, 0.5, 0)
    try:
        with run.checkpoints(folder) as saved:
            batches = run.stream()
            saved.resume(run.fresh(), batches)
        seen['after one that was killed'] = 'taken over'
    except BlockingIOError as error:
        seen['after one that was killed'] = str(error)
    passed = (seen['beside one that lives'] == 'refused') + ('taken over' in seen.values())
    return Count(passed, 2, seen)


if __name__ == '__main__':
    what, where, *rest = sys.argv[1:]
    if what == 'disk':
        print(disk(pathlib.Path(where), *rest))
    else:
        print(json.dumps(saving(pathlib.Path(where), rest[0], int(rest[1]))))
