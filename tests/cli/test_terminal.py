"""What is seen on a terminal, and what in a pipe."""

import os
import pty
import signal
import subprocess
import sys
import termios

import pytest

from peftjax.cli._terminal import progress

BAR = """
from peftjax.cli._terminal import progress, say
with progress(3) as bar:
    bar.set_description('lora')
    bar.update()
    bar.write('lora  75.0')
say('table')
"""


def test_a_terminal_gets_a_bar():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    ran = subprocess.run([sys.executable, '-c', BAR], stdout=theirs, stderr=theirs, check=True)
    os.close(theirs)
    assert ran.returncode == 0
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert 'lora:' in shown and '3' in shown and 'step' in shown
    assert 'lora  75.0' in shown and 'table' in shown


def test_a_pipe_gets_plain_lines():
    ran = subprocess.run([sys.executable, '-c', BAR], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ('lora  75.0\ntable\n', '')


WAITING = """
import signal, sys, time
from peftjax import cli
from peftjax.cli import _inspect

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits "ignore"

def wait(options):
    print('ready', flush=True)
    time.sleep(60)

_inspect.run = wait
sys.argv = ['peftjax', 'inspect']
sys.exit(cli.main())
"""


@pytest.mark.skipif(sys.stderr.isatty(), reason='the tests themselves run on a terminal')
def test_a_quiet_bar_takes_all_calls():
    with progress(1) as bar:
        bar.update()


def test_a_reader_that_goes_away_is_no_error(here):
    command = [sys.executable, '-m', 'peftjax', 'inspect', here.model]
    ran = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert ran.stdout is not None and ran.stderr is not None
    ran.stdout.close()
    assert 'Traceback' not in ran.stderr.read()
    ran.stderr.close()
    assert ran.wait() == 1


def test_interrupting_a_process_ends_it_with_130():
    command = [sys.executable, '-c', WAITING]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    with subprocess.Popen(command, **pipes) as ran:
        assert ran.stdout is not None
        assert ran.stdout.readline() == 'ready\n'
        ran.send_signal(signal.SIGINT)
        _, error = ran.communicate(timeout=60)
    assert (ran.returncode, error) == (130, 'peftjax inspect: interrupted\n')
