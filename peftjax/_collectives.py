"""What the devices of a mesh send each other in a program, from its text as XLA writes it."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

OPERATIONS = (
    'all-gather', 'all-reduce', 'all-to-all', 'collective-permute', 'ragged-all-to-all',
    'reduce-scatter',
)  # fmt: skip

_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.-]+) \(.*\{$')
_EQUATION = re.compile(r'^\s+(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([a-z-]+)\((.*)$')
_ARRAY = re.compile(r'\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]')
_CALLED = re.compile(r'\b(?:condition|body|calls|to_apply)=%?([\w.-]+)|_computations=\{([^}]*)\}')
_CONDITION = re.compile(r'\bcondition=%?([\w.-]+)')
_BOUND = re.compile(r' = s32\[\] constant\((\d+)\)')


class Collective(NamedTuple):
    """Results of one collective operation on one device, each time that it runs.

    Attributes:
      operation: one of `OPERATIONS`.
      sizes: bytes of each array that it gives.
      times: how often it runs.
    """

    operation: str
    sizes: tuple[int, ...]
    times: int

    @property
    def nbytes(self) -> int:
        """Bytes that it gives, all times together."""
        return sum(self.sizes) * self.times


def collectives(text: str) -> list[Collective]:
    """The collective operations of a partitioned program.

    A loop from zero to a constant, such as `lax.scan`, counts as often as it runs, any other once;
    of branches all count.

    Args:
      text: as `compiled.as_text()`, or as it was dumped after a pass.
    """
    bodies, entry = _computations(text)
    runs = _runs(bodies, entry)
    return [
        Collective(operation, _sizes(shape, asynchronous), runs[name])
        for name, lines in bodies.items()
        if runs[name]
        for shape, operation, asynchronous in _found(lines)
    ]


def _found(lines: list[str]) -> Iterator[tuple[str, str, bool]]:
    for line in lines:
        if match := _EQUATION.match(line):
            operation = match[2].removesuffix('-start')
            if operation in OPERATIONS:
                yield match[1], operation, operation != match[2]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the first one to run."""
    bodies: dict[str, list[str]] = {}
    entry, lines = '', []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = bodies.setdefault(match[1], [])
            entry = match[1] if line.startswith('ENTRY') else entry
        else:
            lines.append(line)
    return bodies, entry


def _runs(bodies: Mapping[str, list[str]], entry: str) -> Counter[str]:
    """How often each computation runs."""
    runs: Counter[str] = Counter()

    def run(name: str, times: int) -> None:
        runs[name] += times
        for line in bodies[name]:
            trips = _trips(line, bodies)
            for one, several in _CALLED.findall(line):
                for called in [one] if one else re.findall(r'[\w.-]+', several):
                    if called in bodies:
                        run(called, times * trips)

    run(entry, 1)
    return runs


def _trips(line: str, bodies: Mapping[str, list[str]]) -> int:
    """How often an equation runs what it calls."""
    condition = _CONDITION.search(line)
    if condition is None:
        return 1
    bounds = {bound for each in bodies[condition[1]] for bound in _BOUND.findall(each)}
    return int(bounds.pop()) if len(bounds) == 1 else 1


def _sizes(shape: str, asynchronous: bool) -> tuple[int, ...]:
    sizes = [
        math.prod(map(int, filter(None, dims.split(',')))) * _width(kind)
        for kind, dims in _ARRAY.findall(shape)
    ]
    # what is only begun gives its operands back before its results
    return tuple(sizes[len(sizes) // 2 :] if asynchronous else sizes)


def _width(kind: str) -> int:
    """Bytes of a number, such as `bf16`; of what has fewer bits than a byte, one."""
    bits = re.match(r'[a-z]+(\d+)', kind)
    return max(1, int(bits[1]) // 8) if bits else np.dtype(bool).itemsize
