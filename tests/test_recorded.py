"""What earlier versions sent and left behind is read by today's code, and means what it meant.

``tests/recorded/versions`` has a directory for each version; ``python -m tests.recorded.record`` writes that
of this one anew.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import Struct
from tests.recorded.examples import Kind, check, example, kinds, plain, with_strangers
from tests.recorded.record import VERSIONS, recorded_messages
from tests.recorded.states import JOB, copied, read_states

from hypha import __version__, messages
from hypha.cli.job.rerun import rerun
from hypha.messages import GossipEnvelope, Message, RequestEnvelope, Value, WorkerOffer, WorkerRequest
from hypha.net.bulk import wire as bulk_wire

RECORDED = sorted(VERSIONS.iterdir())
KINDS = {kind.name: kind for kind in kinds()}
HOW = "run `python -m tests.recorded.record` and look at what it changes"
#: its nodes said nothing of versions
EARLIEST = VERSIONS / "before-0.1.0"


def recorded(directory: Path, name: str = "messages.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / name).read_text(encoding="utf-8"))
    return found


def bytes_of(kind: Kind, encoded: str) -> bytes:
    return encoded.encode() if kind.encoding == "json" else base64.b64decode(encoded)


def read(directory: Path) -> None:
    """AssertionError for the first message that is read otherwise than it was meant."""
    for name, entry in recorded(directory).items():
        where = f"{directory.name}, {name}"
        kind = KINDS.get(name.partition(" ")[0])
        assert kind is not None, f"{where}: there is no such message any more, but some nodes send it"
        try:
            value = kind.decode(bytes_of(kind, entry["encoded"]))
        except (msgspec.MsgspecError, bulk_wire.ConnectionBroken) as exc:
            raise AssertionError(f"{where} cannot be read any more: {exc}") from exc
        check(entry["says"], value, where)


@pytest.mark.parametrize("directory", RECORDED, ids=lambda path: path.name)
def test_what_each_version_sent_is_read_as_it_was_meant(directory: Path) -> None:
    read(directory)


@pytest.mark.parametrize("directory", RECORDED, ids=lambda path: path.name)
def test_what_each_version_left_behind_is_read_as_it_was_meant(directory: Path, tmp_path: Path) -> None:
    before = recorded(directory, "states.json")
    today: dict[str, Any] = {}
    try:
        for name, content in read_states(copied(directory / "states", tmp_path / "states")):
            today[name] = content
    except Exception as exc:
        read_last = list(today)[-1:]
        raise AssertionError(
            f"{directory.name}: what is read after {read_last} cannot be read any more: {exc!r}"
        ) from exc
    assert before.keys() <= today.keys()
    for name, content in before.items():
        check(content, today[name], f"{directory.name}, {name}")


def test_the_journal_of_this_version_is_decided_the_same_again() -> None:
    result = rerun(VERSIONS / __version__ / "states" / "scheduler" / JOB / "journal.jsonl")
    assert result.difference is None, f"machines decide otherwise than they did: {HOW}"
    assert (result.machines, result.without_beginning) == (4, 0)


def test_all_that_this_version_sends_is_recorded() -> None:
    present = VERSIONS / __version__
    assert present.is_dir(), f"nothing is recorded of version {__version__}: {HOW}"
    before, now = recorded(present), recorded_messages()
    missing = sorted(now.keys() - before.keys())
    assert not missing, f"{', '.join(missing)}: not recorded; {HOW}"
    other = [name for name in now if before[name]["says"] != now[name]["says"]]
    assert not other, f"{', '.join(other)}: recorded with other fields; {HOW}"


def test_every_struct_on_the_wire_is_in_a_recorded_message() -> None:
    def names(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if "is" in value:
                yield value["is"]
            for one in value.values():
                yield from names(one)
        elif isinstance(value, list):
            for one in value:
                yield from names(one)

    seen = {name for entry in recorded(VERSIONS / __version__).values() for name in names(entry["says"])}
    defined = {
        one.__name__
        for module in (messages, bulk_wire)
        for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, Struct) and one not in (Message, Value, Struct)
    }
    assert defined - seen == set(), "add these to tests/recorded/examples.py"


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_fields_of_a_later_version_are_ignored(kind: Kind) -> None:
    value = kind.example(False)
    sent = with_strangers(value)
    if kind.encoding == "frame":
        payload = msgspec.msgpack.encode(sent)
        assert kind.decode(bulk_wire.encode_length(len(payload)) + payload) == value
    else:
        encode = msgspec.json.encode if kind.encoding == "json" else msgspec.msgpack.encode
        assert kind.decode(encode(sent)) == value


def test_what_came_later_is_as_by_default_in_what_an_earlier_version_sent() -> None:
    entry = recorded(EARLIEST)["request/WorkerOffer (full)"]
    assert "version" not in entry["says"]["body"]
    envelope = msgspec.msgpack.decode(base64.b64decode(entry["encoded"]), type=RequestEnvelope)
    assert isinstance(envelope.body, WorkerOffer)
    assert (envelope.body.version, envelope.body.features) == ("", ())
    entry = recorded(EARLIEST)["gossip/GossipEnvelope (full)"]
    request = msgspec.msgpack.decode(base64.b64decode(entry["encoded"]), type=GossipEnvelope).body
    assert (request.version, request.needs) == ("", ())


def test_what_states_nothing_is_sent_as_earlier_versions_sent_it() -> None:
    """So the peers of tests that state nothing are peers of an earlier version, byte for byte."""
    for name, kind in (("request/WorkerOffer", WorkerOffer), ("gossip/GossipEnvelope", WorkerRequest)):
        envelope = KINDS[name].example(False)
        silent = {"version": "", ("features" if kind is WorkerOffer else "needs"): ()}
        body = msgspec.structs.replace(envelope.body, **silent)
        envelope = msgspec.structs.replace(envelope, body=body)
        if isinstance(envelope, GossipEnvelope):
            envelope = msgspec.structs.replace(envelope, certificates=())
        sent = KINDS[name].encode(envelope)
        assert sent == base64.b64decode(recorded(EARLIEST)[f"{name} (full)"]["encoded"])


# --- the checks themselves --------------------------------------------------------------------------------


class Older(Struct, frozen=True, tag="lease"):
    """A message as an earlier version had it."""

    lease_id: str
    price: float = 1.0
    peers: tuple[str, ...] = ()


class Renamed(Struct, frozen=True, tag="lease"):
    """It with a field under another name."""

    lease_id: str
    cost: float = 1.0
    peers: tuple[str, ...] = ()


class Removed(Struct, frozen=True, tag="lease"):
    """It without a field."""

    lease_id: str
    peers: tuple[str, ...] = ()


class OtherDefault(Struct, frozen=True, tag="lease"):
    """It with a default that makes old messages mean something else."""

    lease_id: str
    price: float = 2.0
    peers: tuple[str, ...] = ()


class Grown(Struct, frozen=True, tag="lease"):
    """It with one more field, as it may be changed."""

    lease_id: str
    price: float = 1.0
    peers: tuple[str, ...] = ()
    version: str = ""


@pytest.mark.parametrize(
    ("now", "least", "complaint"),
    [
        (Renamed, False, "Renamed.price is gone or has another name"),
        (Removed, False, "Removed.price is gone or has another name"),
        (OtherDefault, True, "OtherDefault.price: was 1.0 and is read as 2.0 now"),
    ],
)
def test_a_changed_message_is_told_by_name(now: type[Struct], least: bool, complaint: str) -> None:
    sent = example(Older, least)
    encoded = {"type": "lease", "lease_id": "lease_id"} if least else msgspec.to_builtins(sent)
    with pytest.raises(AssertionError, match=complaint):
        check({**plain(sent), "is": now.__name__}, msgspec.convert(encoded, now), "an earlier version")


def test_a_message_may_have_more_fields_than_it_had() -> None:
    sent = example(Older)
    check({**plain(sent), "is": "Grown"}, msgspec.convert(msgspec.to_builtins(sent), Grown), "here")
    with pytest.raises(AssertionError, match=r"Grown\.version is new, and '0\.2' where nobody sends it"):
        check({**plain(sent), "is": "Grown"}, Grown("lease_id", 13.25, ("peers",), "0.2"), "here")


def renamings(says: Any) -> Iterator[tuple[str, Any]]:
    """``says`` with one field under another name, for each field of each struct in it, and that name."""
    if isinstance(says, dict):
        for field, one in says.items():
            if "is" in says and field != "is":
                yield (
                    f"{field}_before",
                    {**{k: v for k, v in says.items() if k != field}, f"{field}_before": one},
                )
            for name, inside in renamings(one):
                yield name, {**says, field: inside}
    elif isinstance(says, list):
        for at, one in enumerate(says):
            for name, inside in renamings(one):
                yield name, [*says[:at], inside, *says[at + 1 :]]


def test_a_field_that_is_lost_from_any_recorded_message_is_found() -> None:
    """As if today's code had it under another name: the check sees every field of every message."""
    tried = 0
    for name, entry in recorded(VERSIONS / __version__).items():
        kind = KINDS[name.partition(" ")[0]]
        value = kind.decode(bytes_of(kind, entry["encoded"]))
        for field, renamed in renamings(entry["says"]):
            tried += 1
            with pytest.raises(AssertionError, match=f"{field} is gone or has another name"):
                check(renamed, value, name)
    assert tried > len(KINDS)
