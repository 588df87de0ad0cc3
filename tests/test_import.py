"""`import peftjax` is cheap, and brings nothing that is not needed at once."""

import json
import subprocess
import sys

LIMIT = 0.5
"""Of the time that `import jax, flax` takes: machines differ in speed."""

HEAVY = ('transformers', 'orbax', 'matplotlib', 'tokenizers', 'safetensors', 'torch', 'tqdm')

# Processor time, not time on the clock: on a busy machine the clock measures the neighbors.
MEASURE = f"""
import json, sys, time
first = time.process_time()
import jax, flax
before, already = time.process_time(), set(sys.modules)
import peftjax
spent = (time.process_time() - before) / (before - first)
print(json.dumps([spent, [name for name in {HEAVY} if name in set(sys.modules) - already]]))
"""


def measured() -> tuple[float, list[str]]:
    ran = subprocess.run([sys.executable, '-c', MEASURE], capture_output=True, check=True)
    return json.loads(ran.stdout)


def test_import_is_cheap_and_light():
    for _ in range(8):  # best of several; the first may have to compile and to read from disk
        part, heavy = measured()
        assert not heavy
        if part <= LIMIT:
            return
    raise AssertionError(f'import peftjax took {part:.2f} of what jax and flax take, not {LIMIT}')


def test_the_command_line_starts_light():
    code = f"""
import contextlib, sys
from peftjax.cli import main
with contextlib.suppress(SystemExit):
    main(['--help'])
assert not [name for name in {HEAVY} if name in sys.modules]
"""
    subprocess.run([sys.executable, '-c', code], capture_output=True, check=True)
