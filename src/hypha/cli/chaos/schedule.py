"""Which fault when: a schedule that a seed decides, so that a run can be had again."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hypha.cli.chaos.faults import How, Role

_NODES: tuple[Role, ...] = ("worker", "parameter-server", "scheduler", "data", "gateway")
_PROCESSES: tuple[Role, ...] = ("training-executor", "parameter-server-executor")

#: Who can be struck how.
TARGETS: dict[How, tuple[Role, ...]] = {
    "kill": _NODES + _PROCESSES,
    "stop": _NODES + _PROCESSES,
    "cut": _NODES,
    "slow": _NODES,
    "corrupt": ("worker", "scheduler", "data"),
    "fill_disk": ("worker", "parameter-server", "scheduler"),
}
#: A supervisor starts a killed node again after so long (systemd's RestartSec).
RESTART_S = 1.0
#: Other faults are healed after some seconds, ...
HOLD_S = (2.0, 6.0)
#: ... but well before the next one strikes, a share of the interval.
_HOLD_SHARE = 0.5
#: Faults come at the interval's multiples, earlier or later by up to this share of it.
_JITTER = 0.25


@dataclass(frozen=True)
class Planned:
    """``at_s`` counts from the first moment of the disturbance; it is healed ``hold_s`` later. ``pick``, of
    [0, 1), chooses among the nodes of that role.
    """

    at_s: float
    role: Role
    how: How
    hold_s: float
    pick: float = 0.0


def plan(seed: int, seconds: float, interval_s: float, hows: Sequence[How]) -> list[Planned]:
    """Faults for ``seconds``, each role in each way before any comes again. The last one leaves an interval
    to recover in.
    """
    rng = random.Random(seed)
    pairs = _deck(rng, hows)
    planned = []
    for number in range(1, int(seconds // interval_s)):
        at_s = interval_s * (number + rng.uniform(-_JITTER, _JITTER))
        role, how = next(pairs)
        hold_s = min(rng.uniform(*HOLD_S), interval_s * _HOLD_SHARE)
        planned.append(Planned(at_s, role, how, RESTART_S if how == "kill" else hold_s, rng.random()))
    return planned


def _deck(rng: random.Random, hows: Sequence[How]) -> Iterator[tuple[Role, How]]:
    cards = [(role, how) for how in hows for role in TARGETS[how]]
    while True:
        rng.shuffle(cards)
        yield from cards
