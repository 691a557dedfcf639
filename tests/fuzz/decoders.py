"""Everything that decodes what others wrote: each with good examples to start from, and its errors."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import zstandard
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, StopMessage
from safetensors.torch import save
from tests.recorded.examples import PEER, kinds
from tests.recorded.record import VERSIONS
from tests.support.network import Pki
from tests.worker.test_arbiter import arbiter, hear

from hypha.cli.job.rerun import rerun
from hypha.data.manifest import read_manifest
from hypha.data.slices import describe_slice
from hypha.decoding import decode
from hypha.errors import (
    CheckpointUnusable,
    DataError,
    HyphaError,
    IdentityError,
    ModelError,
    Undecodable,
)
from hypha.executor.files.tensors import TensorFile
from hypha.executor.files.updates import contribution_in
from hypha.executor.models.weights import keys_in
from hypha.executor.outer.archive import MOMENTUM, STATE, THETA, read_checkpoint
from hypha.messages import Contribution, GossipEnvelope, PeerRef, SliceRange, encode_json
from hypha.net.bulk import wire as bulk_wire
from hypha.net.bulk.blocks import unpack_block
from hypha.net.discovery.dht import _check, _refs
from hypha.net.discovery.gossip import _hop
from hypha.net.libp2p.protobuf_messages import decode_message, peer_id_in, traceparent_of
from hypha.net.peers.addresses import AddressBook, host_and_port, ip_of, parse
from hypha.pki.certificates import ed25519_key_of, parse_der, peer_id_of_key, roles_in
from hypha.pki.identity import IdentityFiles, load_identity
from hypha.scheduler.durable.ledger import read_ledger
from hypha.scheduler.status.history import read_history
from hypha.tracing import span
from hypha.tracing.operations import ANSWER

#: Files of nodes of this version.
STATES = VERSIONS / "0.1.0" / "states"


@dataclass(frozen=True)
class Target:
    """``read`` takes bytes and raises ``errors`` only. ``values`` are messages, of which one value at a time
    may be spoilt as well, in their ``encoding``.
    """

    name: str
    read: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    errors: tuple[type[Exception], ...] = (Undecodable,)
    values: tuple[Any, ...] = ()
    encoding: str = "msgpack"


def targets(directory: Path) -> list[Target]:
    """All of them; files are written into ``directory``."""
    return [*_messages(), *_requests(), *_wire(), *_addresses(), *_files(directory), *_identities(directory)]


def _messages() -> Iterator[Target]:
    """One for each envelope, with every kind of message that travels in it."""
    by_carrier: dict[tuple[str, str], list[Any]] = {}
    for kind in kinds():
        if kind.encoding != "frame":
            by_carrier.setdefault((str(kind.carrier), kind.encoding), []).append(kind)
    for (_, encoding), found in by_carrier.items():
        carrier = found[0].carrier
        codec = msgspec.json if encoding == "json" else msgspec.msgpack
        read = codec.Decoder(carrier).decode
        values = tuple(kind.example(least) for kind in found for least in (False, True))
        name = getattr(carrier, "__name__", "a union")
        yield Target(
            f"{encoding} of {name}",
            partial(decode, read),
            tuple(map(codec.encode, values)),
            values=values,
            encoding=encoding,
        )


def _requests() -> Iterator[Target]:
    """What a worker makes of a request for workers that decodes."""
    requests = [
        kind.example(least) for kind in kinds() if kind.name.startswith("gossip/") for least in (False, True)
    ]
    read = msgspec.msgpack.Decoder(GossipEnvelope).decode

    def heard(data: bytes) -> None:
        worker = arbiter()
        for action in hear(worker, 0.0, decode(read, data).body):
            msgspec.msgpack.encode(action)
        assert worker.next_wake is None or math.isfinite(worker.next_wake)

    seeds = tuple(map(msgspec.msgpack.encode, requests))
    yield Target("request for workers", heard, seeds, values=tuple(requests))


def _wire() -> Iterator[Target]:
    frames = [kind.example(False) for kind in kinds() if kind.encoding == "frame"]
    broken = (bulk_wire.ConnectionBroken,)
    yield Target(
        "bulk frame",
        bulk_wire.decode_frame,
        tuple(map(msgspec.msgpack.encode, frames)),
        broken,
        values=tuple(frames),
    )
    blocks = map(zstandard.ZstdCompressor(level=3).compress, (b"abc" * 1000, bytes(100_000)))
    yield Target("bulk block", unpack_block, tuple(blocks), broken)
    yield Target(
        "bulk length",
        lambda data: bulk_wire.decode_length(data[:4].ljust(4), 1 << 20),
        (b"\0\0\1\0",),
        broken,
    )
    provide = (STATES / "dht" / "add-provider.bin").read_bytes()
    peers = [Message.Peer(id=b"\x12\x20" + bytes(32), addrs=[b"\x04\x7f\0\0\1\x06\0\x50", b"\x36\x03abc"])]
    answer = Message(type=Message.GET_PROVIDERS, key=b"k", providerPeers=peers, closerPeers=peers)

    def dht(data: bytes) -> None:
        message = decode_message(Message, data)
        _check(message)
        traceparent_of(message)
        for ref in (*_refs(message.providerPeers), *_refs(message.closerPeers)):
            AddressBook(PEER).learn(ref)

    yield Target("DHT message", dht, (provide, answer.SerializeToString()))
    for kind in (HopMessage, StopMessage):

        def circuit(data: bytes, kind: Any = kind) -> None:
            message = decode_message(kind, data)
            traceparent_of(message)
            peer_id_in(message.peer.id)

        good = kind(type=1, peer={"id": b"\x12\x20" + bytes(32)}).SerializeToString()
        yield Target(kind.DESCRIPTOR.name, circuit, (good,))


def _addresses() -> Iterator[Target]:
    texts = (
        f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}",
        f"/dns4/example.org/tcp/4001/p2p/{PEER}/p2p-circuit/p2p/{PEER}",
        "/ip6zone/eth0/ip6/fe80::1/tcp/1",
    )

    def address(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        AddressBook(PEER, ["10.0.0.0/8"]).learn(PeerRef(peer=PEER, addresses=(text,)))
        ip_of(parse(text))
        host_and_port(text)

    yield Target("address", address, tuple(text.encode() for text in texts), (ValueError,))

    def trace(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        _hop(text, PEER)
        with span(ANSWER, {"rpc.method": text[:100]}, parent=text):
            pass

    yield Target("traceparent", trace, (b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01",), ())


def _files(directory: Path) -> Iterator[Target]:
    place = directory / "files"
    place.mkdir(exist_ok=True)

    def of_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
        path = place / name
        path.parent.mkdir(exist_ok=True, parents=True)

        def written(data: bytes) -> object:
            path.write_bytes(data)
            return read(path)

        return written

    tensors = tuple(path.read_bytes()[:100_000] for path in sorted(STATES.rglob("*.safetensors")))
    data = (DataError,)

    def opened(path: Path) -> None:
        with TensorFile(path):
            pass

    yield Target("safetensors header", of_file("t.safetensors", opened), tensors, data)
    part = Contribution(
        round=1,
        worker=PEER,
        incarnation="i",
        samples=8,
        batches=2,
        batch_size=4,
        steps=0,
        ranges=(SliceRange(epoch=0, slice=3, start=0, stop=8),),
    )
    update = save({}, {"contribution": encode_json(part).decode()})
    yield Target("contribution", of_file("u.safetensors", contribution_in), (update,), data)
    yield Target("slice", of_file("s.safetensors", describe_slice), tensors, data)
    yield Target("weights", of_file("w.safetensors", keys_in), tensors, (ModelError,))
    index = b'{"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}'
    yield Target(
        "index of weights", of_file("model.safetensors.index.json", keys_in), (index,), (ModelError,)
    )
    manifest = (STATES / "dataset" / "manifest.json").read_bytes()
    yield Target(
        "manifest", of_file("manifest.json", lambda path: read_manifest(path.parent)), (manifest,), data
    )
    job = STATES / "scheduler" / "recorded"
    ledger = (job / "ledger.json").read_bytes()
    yield Target("ledger", of_file("ledger.json", read_ledger), (ledger,), (HyphaError,))
    yield Target("job.db", of_file("job.db", read_ledger), ((job / "job.db").read_bytes(),), (HyphaError,))
    journal = (job / "journal.jsonl").read_bytes().splitlines(keepends=True)
    yield Target("journal", of_file("journal.jsonl", rerun), (b"".join(journal[:12]),), (HyphaError,))
    (place / "job").mkdir(exist_ok=True)
    shutil.copy(job / "job.db", place / "job" / "job.db")
    history = (job / "history.jsonl").read_bytes()
    yield Target(
        "history",
        of_file("job/history.jsonl", lambda path: read_history(path.parent)),
        (history,),
        (HyphaError,),
    )
    saved = next(job.rglob(STATE))

    def checkpoint(path: Path) -> object:
        # reading it deletes them
        for name in (THETA, MOMENTUM):
            shutil.copy(saved.parent / name, place / name)
        files = {STATE: path, THETA: place / THETA, MOMENTUM: place / MOMENTUM}
        return read_checkpoint(files, "job_id", 2)

    yield Target("checkpoint", of_file(STATE, checkpoint), (saved.read_bytes(),), (CheckpointUnusable,))


def _identities(directory: Path) -> Iterator[Target]:
    files = Pki(directory / "pki").files("fuzzed")
    for name in ("cert", "key", "trust"):
        good = getattr(files, name)
        path = directory / f"{name}.pem"

        def load(data: bytes, name: str = name, path: Path = path) -> None:
            path.write_bytes(data)
            path.chmod(0o600)
            load_identity(IdentityFiles(**{**vars(files), name: path}))

        yield Target(f"{name} file", load, (good.read_bytes(),), (IdentityError,))
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    der = x509.load_pem_x509_certificate(files.cert.read_bytes()).public_bytes(Encoding.DER)

    def certificate(data: bytes) -> None:
        decode(lambda one: (peer_id_of_key(ed25519_key_of(parse_der(one))), roles_in(parse_der(one))), data)

    yield Target("certificate", certificate, (der,))
