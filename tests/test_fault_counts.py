"""A few cases of each fault that `benchmarks/faults.py` counts, run as it is run."""

import json
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
FAULTS = pathlib.Path(__file__).parents[1] / 'benchmarks' / 'faults.py'
if not FAULTS.is_file():
    pytest.skip('the benchmarks are not here', allow_module_level=True)
if sys.platform != 'linux':
    pytest.skip('faults are made by means of Linux', allow_module_level=True)


@pytest.mark.parametrize('fault', ['R1', 'R2', 'R4', 'R5', 'R7', 'R12', 'R13', 'R19', 'R20', 'R21'])
def test_what_is_promised_is_kept(fault, tmp_path):
    out = tmp_path / 'faults.json'
    command = [sys.executable, str(FAULTS), '--quick', '--only', fault, '--out', str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = json.loads(out.read_text())
    assert [row['fault'].split()[0] for row in rows] == [fault] * (2 if fault == 'R1' else 1)
    assert all(0 < row['passed'] == row['cases'] and row['quick'] for row in rows)


def test_a_fault_that_nobody_knows_is_refused():
    command = [sys.executable, str(FAULTS), '--only', 'R99']
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and "no fault 'R99'; there are R1" in ran.stderr
