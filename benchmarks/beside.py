"""Programs beside each other: step times in turns, peak memory and first step each by itself.

What the step benchmarks share: each says what its programs are, `build(name, args) -> (step, count)`
with `step() -> loss`, and calls `measure`.
"""

import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
