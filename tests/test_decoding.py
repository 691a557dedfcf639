"""What others wrote is decoded in one place, and has one error."""

from __future__ import annotations

import ast
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.sources import FILES, SOURCE, parsed

from hypha.cli.job.rerun import rerun
from hypha.data.manifest import MANIFEST_FILE, read_manifest
from hypha.decoding import MAX_REASON, decode, decode_json
from hypha.errors import DataError, HyphaError, Refused, Undecodable
from hypha.executor.files.tensors import TensorFile
from hypha.messages import (
    MAX_ADDRESSES_SENT,
    BulkDial,
    Id,
    JobStamp,
    NextSlice,
    PeerRef,
    RenewLease,
    ReportEvent,
    StatusCall,
    WorkerOffer,
)
from hypha.net.peers.addresses import parse
from hypha.scheduler.durable.ledger import read_ledger
from hypha.worker.bridge.server import _decode

#: Who decodes by itself, and why: what nobody else wrote.
TRUSTED = {
    "decoding.py": "it is the one that does",
    "simulation": "a world in memory reads what it has just written",
    "cli/demo.py": "its own children's output",
    "cli/local": "its own children's output",
    "sinks": "parent and child speak over a pipe of their own",
    "executor/host.py": "its parent is the worker",
    "executor/trial.py": "its parent is the scheduler",
    "config/reading/loading.py": "the operator's own words",
    "cli/job/rerun.py": "an entry that it has written a moment ago",
}
CALLS = {"json.loads", "json.load", "msgspec.json.decode", "msgspec.msgpack.decode"}
METHODS = {"ParseFromString", "FromString"}


def decoders_in(tree: ast.Module) -> set[str]:
    """The names of module-level decoders."""
    found = set()
    for node in tree.body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("Decoder"):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found.add(ast.unparse(target))
    return found


def direct_calls(path: Path) -> Iterator[int]:
    tree = parsed(path)
    decoders = decoders_in(tree)
    # what only becomes the argument of ``decode`` is no call; a function that is passed to it may call
    passed = {
        node.args[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "decode"
        and isinstance(node.args[0], ast.Name)
    }
    inside = {
        id(one)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name in passed
        for one in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and id(node) not in inside:
            name, owner = ast.unparse(node.func), ast.unparse(node.func.value)
            if (
                name in CALLS
                or node.func.attr in METHODS
                or (node.func.attr == "decode" and owner in decoders)
            ):
                yield node.lineno


def test_what_others_wrote_is_decoded_in_one_place() -> None:
    for path in FILES:
        where = str(path.relative_to(SOURCE))
        if not any(where.startswith(trusted) for trusted in TRUSTED):
            lines = list(direct_calls(path))
            assert not lines, (
                f"{where}, lines {lines}: call hypha.decoding.decode, which contains every failure"
            )


def test_the_rule_finds_what_it_forbids(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "_one = msgspec.json.Decoder(int)\n_one.decode(b'')\njson.loads('')\nx.ParseFromString(b'')\n"
        "decode(_one.decode, b'')\ndef read(data):\n    return json.loads(data)\ndecode(read, b'')\n"
    )
    assert list(direct_calls(path)) == [2, 3, 4]


@pytest.mark.parametrize(
    ("read", "data"),
    [
        (lambda data: msgspec.json.decode(data, type=dict[str, str]), b'{"\xff": 1}'),
        (lambda data: msgspec.json.decode(data), b"[" * 100_000),
        (json.loads, "9" * 5000),
        (json.loads, "[" * 100_000),
        (struct.Struct(">I").unpack, b"1"),
        (lambda data: bytes(int(data)), str(1 << 70)),
        (lambda data: bytearray(int(data)), str(1 << 62)),
        (lambda data: data["no such key"], {}),
    ],
)
def test_every_failure_is_one(read: Callable[[object], object], data: object) -> None:
    with pytest.raises(Undecodable) as caught:
        decode(read, data)
    assert 0 < len(str(caught.value)) <= MAX_REASON
    assert caught.value.__cause__ is not None


def test_what_is_no_failure_goes_through() -> None:
    assert decode_json(b'{"peer": "p"}', PeerRef) == PeerRef(peer="p")
    with pytest.raises(KeyboardInterrupt):
        decode(_interrupted, b"")


def _interrupted(data: bytes) -> None:
    raise KeyboardInterrupt


@given(st.text())
def test_a_reason_is_short_and_printable(text: str) -> None:
    def fail(data: bytes) -> None:
        raise ValueError(text)

    with pytest.raises(Undecodable) as caught:
        decode(fail, b"")
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


NO_TEXT = b'{"\xff\xfe": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
DEEP = b'{"a":' + b"[" * 100_000


@pytest.mark.parametrize(
    "text", [NO_TEXT, DEEP, b'{"a": {"dtype": "\xff"}}', b'{"__metadata__": {"a": "\xff"}}']
)
def test_a_spoilt_header_is_an_error_of_the_data(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "update.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(DataError, match=r"update\.safetensors is no valid safetensors file"):
        TensorFile(path)


@pytest.mark.parametrize("text", [NO_TEXT, DEEP, b"\xff"])
def test_spoilt_files_are_errors_that_name_them(text: bytes, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(text)
    with pytest.raises(DataError, match=MANIFEST_FILE):
        read_manifest(tmp_path)
    (tmp_path / "ledger.json").write_bytes(text)
    with pytest.raises(HyphaError, match=r"ledger\.json"):
        read_ledger(tmp_path / "ledger.json")
    (tmp_path / "journal.jsonl").write_bytes(text + b"\n5\n[]\n")
    assert rerun(tmp_path / "journal.jsonl").entries == 0


def test_an_odd_journal_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    entry = {"machine": "lease", "event": [], "at_s": 1, "number": 1, "actions": [], "state": {}, "drawn": []}
    path.write_text(json.dumps(entry))
    with pytest.raises(HyphaError, match="no journal of this version"):
        rerun(path)


@pytest.mark.parametrize(
    "body",
    [
        b'{"event": {"type": "\xff"}}',
        b'{"event":' + b"[" * 100_000,
        # it would be sent on in MessagePack, whose integers have 64 bits
        b'{"event": {"type": "checkpoint-saved", "place": "p", "round": 1%s}}' % (b"0" * 30),
    ],
)
def test_a_spoilt_call_of_an_executor_is_refused(body: bytes) -> None:
    with pytest.raises(Refused, match="the call is no StatusCall"):
        _decode(body, StatusCall)


@pytest.mark.parametrize("kind", [JobStamp, RenewLease, ReportEvent, NextSlice, WorkerOffer, BulkDial])
def test_what_a_peer_has_others_remember_is_short(kind: type[msgspec.Struct]) -> None:
    """Schedulers and workers keep the names of leases, jobs and processes that they were told."""
    names = [field for field in msgspec.structs.fields(kind) if field.type == Id]
    assert names
    stamp, ref = {"job_id": "j"}, {"peer": "p"}
    said = {
        "v": 1, "kind": "train", "seq": 1, "stamp": stamp, "worker": ref, "resources": {}, "price": 1.0,
        "expires_in_s": 1.0, "addresses": [], "event": {"type": "alive"},
    }  # fmt: skip
    said |= {field.encode_name: "n" for field in names}
    if (tag := kind.__struct_config__.tag) is not None:
        said["type"] = tag
    assert isinstance(decode_json(msgspec.json.encode(said), kind), kind)
    for field in names:
        with pytest.raises(Undecodable, match="length <= 256"):
            decode_json(msgspec.json.encode(said | {field.encode_name: "n" * 300}), kind)


def test_a_name_that_is_too_long_is_refused_at_once() -> None:
    """Telling that it is no PeerID takes time that grows with the square of its length."""
    with pytest.raises(Undecodable):
        decode_json(msgspec.json.encode({"peer": "1" * 200}), PeerRef)
    with pytest.raises(Undecodable):
        decode_json(msgspec.json.encode({"peer": "p", "addresses": ["/p2p/" + "1" * 1000]}), PeerRef)
    many = {"peer": "p", "addresses": ["/ip4/10.0.0.1/tcp/1"] * (MAX_ADDRESSES_SENT + 1)}
    with pytest.raises(Undecodable):
        decode_json(msgspec.json.encode(many), PeerRef)
    with pytest.raises(ValueError, match="longer than any address"):
        parse("/ip4/127.0.0.1/tcp/1/p2p/" + "1" * 1000)
