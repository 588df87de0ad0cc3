"""Cases of a test, of which one says on every version what the others say on one."""

from collections.abc import Iterable
from typing import Any

import pytest


def first_everywhere(cases: Iterable[Any]) -> list[Any]:
    """The first as it is, the others marked `slow`. A tuple is a case of several values."""
    first, *others = cases
    each = (case if isinstance(case, tuple) else (case,) for case in others)
    return [first, *(pytest.param(*case, marks=pytest.mark.slow) for case in each)]
