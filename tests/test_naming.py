"""Who a PeerID is, in words: names of certificates, cleaned and bounded, wherever people read."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from hypha import naming
from hypha.cli.job.scheduling import LastWarnings
from hypha.cli.job.timeline import trace_events
from hypha.cli.running import print_error
from hypha.errors import ConfigError, PeerUnreachable, Problem
from hypha.scheduler.status.round_record import OpenRound, RoundRecord, Track, WorkerRound, without_spans
from hypha.telemetry.logs import JsonFormatter, TextFormatter

KNOWN = "12D3KooWNaefi5RhPsS2899hvqtCuA1bPzkLUcs5c8UZQCrQZawm"
UNKNOWN = "12D3KooWSUKLNZ568XvHCaNuy8s6xdJpoqJX5AjAiPoqjeswgEtS"


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    before = dict(naming._names)
    naming.learn(KNOWN, "worker-1")
    yield
    naming._names.clear()
    naming._names.update(before)


def test_a_name_and_the_end_of_the_peer_id() -> None:
    assert naming.shown(KNOWN) == "worker-1 (…QCrQZawm)"
    assert naming.shown(UNKNOWN) == "…jeswgEtS"
    # of another process, which may know it or not
    assert naming.shown(KNOWN, "") == "…QCrQZawm"
    assert naming.shown(UNKNOWN, "gw") == "gw (…jeswgEtS)"
    assert naming.shown("") == ""
    assert naming.names_of([UNKNOWN, KNOWN, KNOWN, ""]) == {KNOWN: "worker-1"}


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("a\x1b[2Jb", "a [2Jb"),
        ("two\nlines\tand \x00 more", "two lines and more"),
        # it would turn the rest of the line around
        ("evil\u202etxt", "evil txt"),
        ("x" * 500, "x" * naming.MAX_NAME),
        ("Straße 7, 東京", "Straße 7, 東京"),
    ],
)
def test_names_are_one_short_line(said: str, shown: str) -> None:
    naming.learn(UNKNOWN, said)
    assert naming.name_of(UNKNOWN) == shown


def test_a_certificate_without_a_name_takes_none_away() -> None:
    naming.learn(KNOWN, "  \n")
    assert naming.name_of(KNOWN) == "worker-1"
    naming.learn(UNKNOWN, "\x07")
    assert naming.shown(UNKNOWN) == "…jeswgEtS"


def test_those_not_met_for_longest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming, "MAX_NAMES", 3)
    naming._names.clear()
    for number in range(3):
        naming.learn(f"peer{number}", f"n{number}")
    naming.learn("peer0", "n0")
    naming.learn("peer3", "n3")
    assert list(naming._names) == ["peer2", "peer0", "peer3"]


def test_peer_ids_in_texts_become_names_and_addresses_stay() -> None:
    text = f"{KNOWN} and ({UNKNOWN}), at /ip4/192.0.2.1/tcp/1/p2p/{KNOWN}/p2p-circuit/p2p/{UNKNOWN}; x{KNOWN}"
    assert naming.named(text) == (
        "worker-1 (…QCrQZawm) and (…jeswgEtS), "
        f"at /ip4/192.0.2.1/tcp/1/p2p/{KNOWN}/p2p-circuit/p2p/{UNKNOWN}; x{KNOWN}"
    )


def record(**fields: object) -> logging.LogRecord:
    made = logging.makeLogRecord(
        {"name": "hypha.net", "levelno": logging.WARNING, "msg": "Lost %s.", **fields}
    )
    made.args = (KNOWN,)
    return made


def test_logs_have_names_for_people_and_whole_peer_ids_for_machines() -> None:
    text = TextFormatter().format(record(peer_id=KNOWN, round=3))
    assert text.endswith("hypha.net: Lost worker-1 (…QCrQZawm). peer_id=worker-1 (…QCrQZawm) round=3")
    entry = json.loads(JsonFormatter("hypha-worker").format(record(peer_id=KNOWN, worker_peer_id=UNKNOWN)))
    assert entry["message"] == "Lost worker-1 (…QCrQZawm)."
    assert (entry["peer_id"], entry["peer_name"]) == (KNOWN, "worker-1")
    assert entry["worker_peer_id"] == UNKNOWN
    assert "worker_name" not in entry


def test_the_pages_warnings_have_names() -> None:
    warnings = LastWarnings()
    warnings.handle(record(peer_id=KNOWN))
    (line,) = warnings.lines
    assert (line.message, line.peer, line.name) == ("Lost worker-1 (…QCrQZawm).", KNOWN, "worker-1")


def test_errors_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    print_error(PeerUnreachable(KNOWN, "nothing listens there"))
    print_error(ConfigError([Problem("a", f"{KNOWN} twice"), Problem("b", "c")]))
    assert said.getvalue().splitlines() == [
        "error: peer worker-1 (…QCrQZawm) is unreachable: nothing listens there",
        "error: 2 problems",
        "  a: worker-1 (…QCrQZawm) twice",
        "  b: c",
    ]


def test_a_rounds_record_has_names_and_the_timeline_shows_them() -> None:
    opened = OpenRound("job", 0, 0, 0.0, 100.0, server=UNKNOWN, tracks={KNOWN: Track("training", 0.0)})
    made = opened.record(2.0)
    assert made.names == {KNOWN: "worker-1"}
    # older ones are kept by the thousand, and what is newer has the same names
    assert without_spans(made).names == {}
    titles = [event.args.get("name") for event in trace_events([made]) if event.name == "process_name"]
    assert sorted(map(str, titles)) == ["node worker-1 (…QCrQZawm)", "node …jeswgEtS", "scheduler"]


def test_a_record_without_names_is_read() -> None:
    older = RoundRecord("job", 0, 0, 1.0, workers=(WorkerRound(KNOWN),))
    titles = [event.args.get("name") for event in trace_events([older]) if event.name == "process_name"]
    assert "node …QCrQZawm" in titles
