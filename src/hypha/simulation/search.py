"""Runs scenarios, many at a time, and shrinks one that fails to the shortest that fails in the same way."""

from __future__ import annotations

import queue
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import IO, Self

import msgspec
from msgspec import Struct

from hypha.config.environment import child_environment
from hypha.simulation.running import ScenarioVerdict, run_scenario
from hypha.simulation.scenario import Scenario, random_scenario, simpler

#: scenarios that one process runs: what was killed in them is only freed with it
_A_PROCESS = 20
#: a scenario takes seconds of the processor; one that takes so many stands still in some loop, and its
#: process is killed: a failure like any other
_LONGEST_CPU_S = 120


class Order(Struct, frozen=True):
    scenario: Scenario
    journal: bool = False


def run_lines(lines: IO[bytes], out: IO[bytes]) -> None:
    """Run the orders in ``lines`` (JSON) and write a verdict each; only failures carry their log."""
    for line in lines:
        order = msgspec.json.decode(line, type=Order)
        used = resource.getrusage(resource.RUSAGE_SELF)
        longest = int(used.ru_utime + used.ru_stime) + _LONGEST_CPU_S
        resource.setrlimit(resource.RLIMIT_CPU, (longest, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        verdict = run_scenario(order.scenario)
        if not order.journal:
            verdict = msgspec.structs.replace(verdict, journal=b"")
        if not verdict.problems:
            verdict = msgspec.structs.replace(verdict, log=())
        out.write(msgspec.json.encode(verdict) + b"\n")
        out.flush()


class Runner:
    """Runs scenarios in a process of its own, with the same order of sets every time; a context manager. The
    process is replaced now and then: what was killed in its worlds is only freed with it. ``change`` names a
    function (``module:function``) that it calls first.
    """

    def __init__(self, change: str = "") -> None:
        self._change = change
        self._child: subprocess.Popen[bytes] | None = None
        self._runs = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._end()

    def _end(self) -> int:
        child, self._child = self._child, None
        if child is None:
            return 0
        with child:
            if child.stdin is not None:
                child.stdin.close()
        return child.returncode

    def run(self, scenario: Scenario, journal: bool = False) -> ScenarioVerdict:
        """Its verdict; a process that dies is one, too. With ``journal`` it is there in any case."""
        if self._child is None or self._runs >= _A_PROCESS:
            self._end()
            environment = {**child_environment(), "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "hypha.simulation", "--run", "--with", self._change]
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
            self._runs = 0
        self._runs += 1
        stdin, stdout = self._child.stdin, self._child.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("a pipe that was asked for is not there")
        try:
            stdin.write(msgspec.json.encode(Order(scenario, journal)) + b"\n")
            stdin.flush()
        except BrokenPipeError:
            line = b""
        else:
            line = stdout.readline()
        if line:
            return msgspec.json.decode(line, type=ScenarioVerdict)
        problem = f"the process that ran it ended with exit code {self._end()}"
        return ScenarioVerdict(scenario, (problem,), (), 0.0, 0.0)


def run_many(scenarios: Sequence[Scenario], processes: int, change: str = "") -> Iterator[ScenarioVerdict]:
    """Verdicts as they come."""
    waiting: queue.SimpleQueue[Scenario] = queue.SimpleQueue()
    for scenario in scenarios:
        waiting.put(scenario)
    runners = threading.local()
    made: list[Runner] = []

    def work(_: int) -> ScenarioVerdict:
        if not hasattr(runners, "mine"):
            runners.mine = Runner(change)
            made.append(runners.mine)
        verdict: ScenarioVerdict = runners.mine.run(waiting.get_nowait())
        return verdict

    with ThreadPoolExecutor(max(1, processes)) as pool:
        try:
            for future in as_completed([pool.submit(work, number) for number in range(len(scenarios))]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            for runner in made:
                runner.__exit__()


def search(
    first: int, count: int, processes: int, tell: Callable[[str], object], change: str = ""
) -> list[ScenarioVerdict]:
    """Run ``count`` random scenarios; ``tell`` each that fails, and the shortest that fails like it."""
    began = time.monotonic()
    failed: list[ScenarioVerdict] = []
    struck = done = 0
    virtual_s = 0.0
    scenarios = [random_scenario(seed) for seed in range(first, first + count)]
    for verdict in run_many(scenarios, processes, change):
        done += 1
        struck += len(verdict.struck)
        virtual_s += verdict.lasted_s
        if verdict.problems:
            failed.append(verdict)
            problems, faults = "; ".join(verdict.problems), ", ".join(verdict.struck)
            tell(f"seed {verdict.scenario.seed}: {problems} [struck: {faults}]")
    took_s = time.monotonic() - began
    tell(
        f"{done} schedules with {struck} faults, {virtual_s / 3600:.1f} hours of theirs in {took_s:.0f} s: "
        f"{len(failed)} failed"
    )
    for verdict in failed[:3]:
        with Runner(change) as runner:
            tell(as_test(shrink(verdict.scenario, lambda one: bool(runner.run(one).problems))))
    return failed


def shrink(scenario: Scenario, fails: Callable[[Scenario], bool]) -> Scenario:
    """The simplest scenario that still ``fails``, found by leaving out one thing after the other."""
    while True:
        for candidate in simpler(scenario):
            if fails(candidate):
                scenario = candidate
                break
        else:
            return scenario


def as_test(scenario: Scenario) -> str:
    """A test to paste."""
    plain = Scenario()
    parts = [
        f"        {name}={getattr(scenario, name)!r},"
        for name in scenario.__struct_fields__
        if getattr(scenario, name) != getattr(plain, name)
    ]
    body = "\n".join(parts)
    return (
        f"def test_seed_{scenario.seed}() -> None:\n"
        f"    scenario = Scenario(\n{body}\n    )\n"
        f"    assert run_scenario(scenario).problems == ()\n"
    )
