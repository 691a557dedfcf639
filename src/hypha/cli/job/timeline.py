"""``hypha timeline``: a job's rounds as a Chrome trace, which https://ui.perfetto.dev opens.

One process a node; a track each for loading, training, sending and waiting, and for what a parameter server
does; rounds as spans of the scheduler; faults as instants. Times are in microseconds since the first round.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from msgspec import UNSET, Struct, UnsetType, to_builtins

from hypha.cli.printing import write_text
from hypha.naming import shown
from hypha.scheduler.status.round_record import RoundRecord, Span, SpanKind

JobArgument = Annotated[str, typer.Argument(help="A job's state directory, or its name under --state-dir.")]
StateOption = Annotated[Path, typer.Option("--state-dir", help="Where the scheduler keeps its jobs' state.")]

_SCHEDULER = 1
#: by what is done; 0 is the node's own
_TRACKS: dict[SpanKind, int] = {
    "loading": 1,
    "training": 2,
    "sending": 3,
    "waiting": 4,
    "collecting": 5,
    "outer-step": 6,
    "broadcast": 7,
}
_SERVER_LOADING = 8
_NAMES = {
    **{number: name for name, number in _TRACKS.items()},
    5: "parameter server: collecting updates",
    6: "parameter server: outer step",
    7: "parameter server: broadcast",
    _SERVER_LOADING: "parameter server: loading",
}

Args = dict[str, str | int | float | None]


class TraceEvent(Struct):
    """An event of the Chrome trace format: ``X`` has a duration, ``i`` is an instant, ``M`` names something.
    ``ts`` and ``dur`` are in microseconds.
    """

    ph: str
    name: str
    pid: int
    tid: int
    ts: int = 0
    dur: int | UnsetType = UNSET
    s: str | UnsetType = UNSET
    args: Args = {}


def timeline(
    job: JobArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("rounds.json"),
    state_dir: StateOption = Path("state"),
) -> None:
    """Write the rounds of a job as a trace that opens in Perfetto (ui.perfetto.dev)."""
    from hypha.scheduler.status.history import read_history

    records = read_history(job_directory(job, state_dir))
    text = json.dumps({"displayTimeUnit": "ms", "traceEvents": to_builtins(trace_events(records))})
    write_text(output, text)
    typer.echo(f"{len(records)} rounds are in {output}; open it at ui.perfetto.dev")


def job_directory(job: str, state_dir: Path) -> Path:
    """``job`` itself where it is a directory, else the job of that name in ``state_dir``."""
    return Path(job) if Path(job).is_dir() else state_dir / job


def trace_events(records: Sequence[RoundRecord]) -> list[TraceEvent]:
    """Names first, then everything in the order of time."""
    if not records:
        return []
    # a round of which only the ledger knows may have no beginning; it stands at the start then
    start = min((record.began for record in records if record.began), default=0.0)
    nodes = _nodes(records)
    events = [
        event
        for record, length_s in zip(records, _lengths(records), strict=True)
        for event in _of_round(record, max(0.0, record.began - start), length_s, nodes)
    ]
    used = {(event.pid, event.tid) for event in events}
    # what is around something comes before it
    events.sort(key=lambda event: (event.ts, -event.dur if isinstance(event.dur, int) else 0))
    names = {peer: name for record in records for peer, name in record.names.items()}
    return [*_metadata(nodes, names, used), *events]


def _lengths(records: Sequence[RoundRecord]) -> list[float]:
    """How long each record may be: clocks are rounded, and a round must not reach into the next one."""
    begins = sorted(record.began for record in records)
    lengths = []
    for record in records:
        later = bisect_right(begins, record.began)
        until_next_s = begins[later] - record.began if later < len(begins) else record.length_s
        lengths.append(min(record.length_s, until_next_s))
    return lengths


def _nodes(records: Sequence[RoundRecord]) -> dict[str, int]:
    peers = {worker.peer for record in records for worker in record.workers}
    peers |= {fault.peer for record in records for fault in record.faults}
    peers |= {record.server for record in records}
    return {peer: number for number, peer in enumerate(sorted(peers - {""}), _SCHEDULER + 1)}


def _metadata(
    nodes: dict[str, int], names: dict[str, str], used: set[tuple[int, int]]
) -> Iterator[TraceEvent]:
    titles = {pid: f"node {shown(peer, names.get(peer, ''))}" for peer, pid in nodes.items()}
    for pid, name in ({_SCHEDULER: "scheduler"} | titles).items():
        yield TraceEvent("M", "process_name", pid, 0, args={"name": name})
        yield TraceEvent("M", "process_sort_index", pid, 0, args={"sort_index": pid})
    for pid, tid in sorted(used):
        name = _NAMES.get(tid, "rounds" if pid == _SCHEDULER else "faults")
        yield TraceEvent("M", "thread_name", pid, tid, args={"name": name})


def _of_round(
    record: RoundRecord, at_s: float, length_s: float, nodes: dict[str, int]
) -> Iterator[TraceEvent]:
    """The round lies at ``at_s`` in the timeline. What it holds is counted from there, and cut at its end."""

    def microseconds(within_s: float) -> int:
        return round((at_s + min(within_s, length_s)) * 1e6)

    def lasting(name: str, pid: int, tid: int, span: Span, args: Args) -> TraceEvent:
        begin, end = microseconds(span.from_s), microseconds(span.to_s)
        return TraceEvent("X", name, pid, tid, ts=begin, dur=max(0, end - begin), args=args)

    of: Args = {"round": record.round + 1}
    about: Args = {
        **of,
        "generation": record.generation,
        "samples": record.samples,
        "loss": record.loss,
        "update_norm": record.update_norm,
        "outcome": "done again" if record.discarded else "applied" if record.applied else "cut short",
    }
    whole = Span("waiting", 0.0, length_s)
    yield lasting(f"round {record.round + 1}", _SCHEDULER, 0, whole, about)
    for worker in record.workers:
        part: Args = {**of, "samples": worker.samples, "batches": worker.batches, "loss": worker.loss}
        for span in worker.spans:
            yield lasting(span.kind, nodes[worker.peer], _TRACKS[span.kind], span, part)
    for span in record.server_spans if record.server else ():
        track = _SERVER_LOADING if span.kind == "loading" else _TRACKS[span.kind]
        yield lasting(span.kind, nodes[record.server], track, span, of)
    for fault in record.faults:
        pid, args = nodes.get(fault.peer, _SCHEDULER), {**of, "text": fault.text}
        yield TraceEvent("i", fault.what, pid, 0, ts=microseconds(fault.at_s), s="p", args=args)
