"""One command as several processes: started here, or by a cluster."""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any, NoReturn

import jax

from peftjax.cli._numbers import count, place

AUTO = 'auto'
LIFELINE = 'PEFTJAX_LIFELINE'
"""Set where a process was started here: it ends when its standard input does."""

GRACE = 20.0
"""Seconds that the others have to end by themselves, once one has ended badly."""

HEARTBEAT = 10
"""Seconds after which a process that says nothing counts as dead, where all are on one machine."""

GO_ON = 'The same command with --resume goes on from the last checkpoint'

SHUTDOWN = 60
"""Seconds that a process waits at its end for the others."""


def add(sub: argparse.ArgumentParser) -> None:
    """Adds the options to a command."""
    group = sub.add_argument_group('over several processes')
    group.add_argument(
        '--processes',
        type=count,
        metavar='N',
        help='compute --mesh in so many processes, all started here unless there is a coordinator',
    )
    group.add_argument(
        '--coordinator',
        metavar='HOST:PORT',
        help='this is one of the processes, the first of which listens there; '
        f'{AUTO} asks the cluster (Slurm, Open MPI, TPU)',
    )
    group.add_argument('--process', type=place, metavar='I', help='which of them this is, from 0')


def is_launch(options: argparse.Namespace) -> bool:
    """Whether options ask that processes be started here."""
    return getattr(options, 'processes', None) is not None and options.coordinator is None


def launch(arguments: Sequence[str], processes: int) -> int:
    """Runs a command in so many processes of this machine.

    What the first says is heard; of the others only errors that the first did not tell of. They
    end when this process ends, however it does; SIGTERM is handed on to them.

    Args:
      arguments: of the command, without a coordinator.
      processes: how many.

    Returns:
      The exit code: that of the first process that ended badly, 128 and the signal where one did.
    """
    address = f'localhost:{_free_port()}'
    command = [sys.executable, '-m', 'peftjax', *arguments, '--coordinator', address]
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, processes)]
        children = [
            stack.enter_context(_child([*command, '--process', str(i)], error))
            for i, error in enumerate([None, *said])
        ]
        try:
            with _handing_on(children):
                code = _attend(children)
        except KeyboardInterrupt:  # the terminal has told them too
            code = _attend(children)
        _tell(children, said)
    return code


@contextlib.contextmanager
def _child(command: Sequence[str], error: IO[bytes] | None) -> Iterator[subprocess.Popen]:
    """A process that does not outlive what is done with it."""
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=None if error is None else subprocess.DEVNULL,
        stderr=error,
        env={**os.environ, LIFELINE: '1'},
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


@contextlib.contextmanager
def _handing_on(children: Sequence[subprocess.Popen]) -> Iterator[None]:
    """Hands SIGTERM on, as a scheduler sends it to what it started."""

    def hand_on(*_: Any) -> None:
        for child in children:
            child.send_signal(signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread alone
        return
    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _attend(children: Sequence[subprocess.Popen]) -> int:
    """Waits for all to end; once one did so badly, not for long."""
    code, until = 0, float('inf')
    while True:
        ends = [child.poll() for child in children]
        if not code and any(ends):
            code, until = next(filter(None, ends)), time.monotonic() + GRACE
        if None not in ends:
            return code if code >= 0 else 128 - code
        if time.monotonic() > until:
            for child in children:
                child.kill()
        time.sleep(0.05)


def _tell(children: Sequence[subprocess.Popen], said: Sequence[IO[bytes]]) -> None:
    """Which process a signal ended; the errors of others, where the first had none of its own."""
    ended = [signal.Signals(-c.returncode).name if c.returncode < 0 else None for c in children]
    for i, name in enumerate(ended):
        if name is not None:
            print(f'process {i} of {len(children)} was ended by {name}. {GO_ON}', file=sys.stderr)
    if children[0].returncode > 0:
        return
    for child, error in zip(children[1:], said, strict=True):
        if child.returncode:
            error.seek(0)
            sys.stderr.write(error.read().decode(errors='replace'))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(('localhost', 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def joined(options: argparse.Namespace, devices: int) -> Iterator[None]:
    """This process as one of several, if it is; those behind the first say nothing.

    Args:
      options: with `processes`, `coordinator` and `process`.
      devices: of all processes together, by `--mesh`; 0 where none is named.

    Raises:
      ValueError: options that do not fit each other.
    """
    if options.coordinator is None:
        if options.process is not None:
            raise ValueError('--process says which of several this is: name their --coordinator')
        yield
        return
    _check(options, devices)
    if os.environ.get(LIFELINE):
        threading.Thread(target=_end_with_input, daemon=True).start()
        _hush()
    jax.distributed.initialize(**_how(options, devices), shutdown_timeout_seconds=SHUTDOWN)
    if jax.process_index() == 0:
        yield
        return
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _check(options: argparse.Namespace, devices: int) -> None:
    """Refuses options that do not fit each other.

    Raises:
      ValueError: with what is missing.
    """
    if not devices:
        raise ValueError('several processes compute on one mesh: add --mesh, such as data=4')
    if options.processes is not None and devices % options.processes:
        raise ValueError(
            f'--mesh {options.mesh} has {devices} devices, which {options.processes} processes '
            'cannot share evenly: choose a multiple'
        )
    if options.coordinator == AUTO:
        return
    if options.processes is None or options.process is None:
        raise ValueError(
            f'--coordinator {options.coordinator} needs --processes, how many there are, and '
            f'--process, which this is; or --coordinator {AUTO} on a cluster'
        )
    if options.process >= options.processes:
        raise ValueError(f'--process must be below {options.processes}; got {options.process}')


def _how(options: argparse.Namespace, devices: int) -> dict[str, Any]:
    """What JAX is told of the processes; a CPU becomes each one's part of the devices."""
    own = devices // options.processes if options.processes else None
    if own is not None:
        jax.config.update('jax_num_cpu_devices', own)
    if options.coordinator == AUTO:
        return {}
    how = {
        'coordinator_address': options.coordinator,
        'num_processes': options.processes,
        'process_id': options.process,
    }
    if os.environ.get(LIFELINE):  # on one machine: nobody else listens, each has devices of its own
        how['coordinator_bind_address'] = options.coordinator
        how['heartbeat_timeout_seconds'] = HEARTBEAT
        how['local_device_ids'] = range(options.process * own, (options.process + 1) * own)
    return how


def _hush() -> None:
    """Leaves standard output to Python: the collectives of a CPU tell there whom they found."""
    sys.stdout.flush()
    own = os.dup(1)
    with open(os.devnull, 'wb') as nowhere:
        os.dup2(nowhere.fileno(), 1)
    sys.stdout = open(own, 'w', buffering=1, encoding=sys.stdout.encoding)


def _end_with_input() -> NoReturn:
    """Ends this process once the one that started it is gone."""
    while os.read(0, 1024):
        pass
    os._exit(1)
