"""What one evaluation of a traced function carries along, and how it calls named values."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from peftjax._record import Recorder
from peftjax._standin import StandIn
from peftjax._types import Path


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of the function that a method was attached to; others may use its leaves too.

    Attributes:
      counts: how often each name occurred in it.
      biases: for each leaf whose output is adapted, the leaves that are its layer's bias.
      alone: those of them that were used in one way, and the kind of it.
    """

    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    biases: Mapping[Path, Sequence[Path]] = dataclasses.field(default_factory=dict)
    alone: Mapping[Path, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Run:
    """What one evaluation carries along.

    Attributes:
      named: stand-ins of named values, by path.
      served: for each adapted path, how its uses were served; filled while running.
      recorder: notes sites, while they are discovered.
      places: paths of all named values, in the order of the trace.
      stack: lengths of the scans around.
      plan: what is known of the function that the method was attached to.
      early: for each leaf that had to become an array before its use, why; filled while running.
    """

    named: Mapping[Path, StandIn]
    served: dict[Path, dict[str, None]]
    recorder: Recorder | None = None
    places: tuple[Path, ...] = ()
    stack: tuple[int, ...] = ()
    plan: Plan = Plan()
    early: dict[Path, dict[str, None]] = dataclasses.field(default_factory=dict)


def numbered(names: Sequence[str], run: Run) -> tuple[Path, ...]:
    """Paths of named values: `@key` where there is one of that name, else `@key/0`, `@key/1`.

    A function that calls the model several times has its names as often, and adapts all of them.
    """
    adapted = {path[1:].partition('/')[0] for path in run.named}
    paths, seen = [], Counter[str]()
    total = Counter(names)
    for name in names:
        once = run.plan.counts.get(name, total[name])
        if name in adapted and total[name] % once:
            raise ValueError(
                f'a function must name {name!r} as often as the one that was attached to, which '
                f'did so {once} times, or several times as often; this one does so {total[name]} '
                'times, and which of them is adapted cannot be told. Attach to this function'
            )
        paths.append(f'@{name}' if once == 1 else f'@{name}/{seen[name] % once}')
        seen[name] += 1
    return tuple(paths)
