"""The files that nodes leave for the next version of themselves: written here by the code that writes them in
production, and read by the code that reads them there.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import torch
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from multiaddr import Multiaddr
from safetensors.torch import save_file
from tests.recorded.examples import PEER, descriptor, example, peer
from tests.scheduler.scene import Scene

from hypha.cli.job.rerun import rerun
from hypha.config.models import CacheConfig, StorageConfig
from hypha.config.offers import OfferConfig
from hypha.data.manifest import load_dataset_directory, make_manifest, write_manifest
from hypha.executor.files import tensors
from hypha.executor.outer.archive import MOMENTUM, STATE, THETA, CheckpointState, read_checkpoint
from hypha.journal import Journal, write_entries
from hypha.messages import (
    CheckpointIndex,
    HoldCheckpoint,
    JobStamp,
    LedgerRound,
    Resources,
    SliceAssigned,
    TransferMeta,
    WorkerOffer,
    WorkerRequest,
)
from hypha.net.bulk.files import hash_file
from hypha.net.discovery.dht import _refs, key_of
from hypha.rules.leases import Tick
from hypha.scheduler.data.slices import SliceTracker, TrackerState
from hypha.scheduler.durable.export import Published
from hypha.scheduler.durable.ledger import Ledger, Standing, export_ledger, read_ledger
from hypha.scheduler.durable.state_directory import CheckpointStore, StateDirectory
from hypha.scheduler.leasing.allocator import Allocator
from hypha.scheduler.leasing.events import Gained, LeaseFailed, LeaseGained, Offered, Search, Want
from hypha.scheduler.leasing.renewal import Renewal, Renewed
from hypha.scheduler.status.history import FILE, HistoryFile, read_history
from hypha.scheduler.status.round_record import RoundRecord
from hypha.worker.leasing.arbiter import Arbiter
from hypha.worker.leasing.events import RenewAsked, RequestReceived
from hypha.worker.leasing.terms import WorkerCapacity
from hypha.worker.slices.cache import SliceCache
from hypha.worker.storage.replicas import Owner, ReplicaStore

JOB, ROUND = "recorded", 2
STORAGE = StorageConfig(checkpoints_gb=1.0, keep_days=36500.0)
LEASE = "0123456789abcdef"


def write_states(into: Path) -> None:
    """Every file, in a directory of each kind of node below ``into``."""
    _write_dataset(into / "dataset")
    with StateDirectory(into / "scheduler", JOB) as state:
        state.prepare()
        index = _write_checkpoint(state)
        _write_ledger(state, into / "dataset", index)
        HistoryFile(state.path / FILE).append([_round_record()])
        _write_journal(state.path / "journal.jsonl")
        _write_copy(into / "worker" / "checkpoints", index, state.checkpoints / f"round-{ROUND}")
        for path in (state.incoming, state.export):
            shutil.rmtree(path)
        (state.path / "lock").unlink()
    (into / "model").mkdir()
    published = example(Published)
    (into / "model" / "hypha.json").write_bytes(msgspec.json.encode(published))
    _write_cache(into / "worker" / "cache", into / "dataset")
    _write_announcement(into / "dht")


def read_states(directory: Path) -> Iterator[tuple[str, Any]]:
    """Name and content of each, as today's code reads it. ``directory`` is changed by that: give a copy."""
    dataset = load_dataset_directory(directory / "dataset")
    yield "dataset manifest", dataset.manifest
    yield "dataset manifest's hash", dataset.manifest_hash
    with StateDirectory(directory / "scheduler", JOB) as state:
        ledger = Ledger(state.ledger)
        for name in ("standing", "slices", "replicas", "starts", "open_round", "leases"):
            yield f"ledger: {name}", getattr(ledger, name)()
        yield "ledger: newest_start", ledger.starts()[0].round
        yield "ledger: published", ledger.published()
        ledger.close()
        yield "ledger: all of it", read_ledger(state.ledger)
        yield "exported ledger", read_ledger(state.path / "ledger.json")
        yield "history", read_history(state.path)
        for machine, entries in _journal(state.path / "journal.jsonl").items():
            part = state.path / "part.jsonl"
            part.write_bytes(b"\n".join(entries))
            # a later version may decide otherwise; it must be able to read what it would decide about
            yield f"journal: {machine} can be run again", rerun(part).machines == 1
        job_id = example(Standing).job_id
        store = CheckpointStore(state, job_id, 3)
        yield "checkpoint is whole", store.verify(ROUND)
        yield "checkpoint: index", store.index(ROUND)
        files = {name: store.path(ROUND, name) for name in (THETA, MOMENTUM, STATE)}
        theta, momentum, about = read_checkpoint(files, job_id, ROUND)
        yield "checkpoint: state", about
        yield "checkpoint: theta", _numbers(theta.all())
        yield "checkpoint: momentum", _numbers(momentum)
    copies = directory / "worker" / "checkpoints"
    yield "copies: owner", msgspec.json.decode((copies / job_id / "owner.json").read_bytes(), type=Owner)
    yield "copies", ReplicaStore(copies, STORAGE).find(PEER, JOB)
    cache = SliceCache(directory / "worker" / "cache", CacheConfig())
    yield "slice cache", {"slices": cache.cached("tiny"), "bytes": cache.size_bytes}
    about_model = (directory / "model" / "hypha.json").read_bytes()
    yield "published model", msgspec.json.decode(about_model, type=Published)
    announced = Message.FromString((directory / "dht" / "add-provider.bin").read_bytes())
    yield (
        "DHT announcement",
        {
            "type": announced.type,
            "is of the dataset": announced.key == key_of("tiny"),
            "key": announced.key,
            "providers": _refs(announced.providerPeers),
        },
    )


def _journal(path: Path) -> dict[str, list[bytes]]:
    """Its lines by machine."""
    found: dict[str, list[bytes]] = {}
    for line in path.read_bytes().splitlines():
        if (machine := json.loads(line).get("machine")) is not None:
            found.setdefault(machine, []).append(line)
    return found


def copied(directory: Path, to: Path) -> Path:
    """A copy that may be changed, as young as if its nodes had just stopped."""
    shutil.copytree(directory, to, copy_function=shutil.copyfile)
    for path in to.rglob("*"):
        os.utime(path)
    return to


def _numbers(found: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: [str(value.dtype), value.tolist()] for name, value in sorted(found.items())}


def _write_dataset(into: Path) -> None:
    into.mkdir(parents=True)
    for index in range(2):
        pixels = torch.arange(6, dtype=torch.float32).reshape(3, 2) + index
        labels = torch.arange(3, dtype=torch.int64)
        save_file({"pixel_values": pixels, "labels": labels}, into / f"slice-{index:04}.safetensors")
    write_manifest(into, make_manifest(into, "tiny"))


def _write_checkpoint(state: StateDirectory) -> CheckpointIndex:
    job_id, life = example(Standing).job_id, JobStamp(job_id="", generation=1, round=ROUND)
    store = CheckpointStore(state, job_id, 3)
    weights = {"layer.weight": torch.tensor([[0.5, -1.25], [3.0, 0.125]])}
    buffers = {"layer.seen": torch.tensor(7, dtype=torch.int64)}

    def place(name: str) -> Path:
        return store.place_for(TransferMeta(kind="checkpoint", name=name, size=0, stamp=life))

    theta = tensors.write(place(THETA), {**weights, **buffers}).blake3
    momentum = tensors.write(place(MOMENTUM), {"layer.weight": torch.full((2, 2), 0.25)}).blake3
    about = CheckpointState(job_id, 1, ROUND, theta, momentum, (PEER,))
    place(STATE).write_bytes(msgspec.json.encode(about))
    for name in (THETA, MOMENTUM, STATE):
        path = place(name)
        size, hashed = hash_file(path)
        store.arrived(TransferMeta(kind="checkpoint", name=name, size=size, blake3=hashed, stamp=life))
    assert store.complete(ROUND)
    return store.index(ROUND)


def _write_ledger(state: StateDirectory, dataset: Path, index: CheckpointIndex) -> None:
    described = load_dataset_directory(dataset)
    opening = msgspec.structs.replace(example(Standing), manifest_hash=described.manifest_hash)
    tracker = SliceTracker([part.samples for part in described.manifest.slices])
    ledger = Ledger(state.ledger)
    ledger.open_job(opening, described.manifest, tracker.to_state())
    ledger.first_theta("theta of round 0")
    entry = example(LedgerRound)
    for round_ in range(ROUND):
        one = msgspec.structs.replace(entry, generation=0, round=round_, theta=f"t{round_}", discarded=False)
        ledger.record(one, tracker.to_state(), 10 * round_)
    ledger.keep_slices(msgspec.structs.replace(example(TrackerState), version=9))
    ledger.checkpoint(ROUND, "scheduler")
    ledger.replicated(peer(), index)
    gained = msgspec.convert({**msgspec.to_builtins(example(LeaseGained)), "lease_id": LEASE}, LeaseGained)
    ledger.lease_gained(gained)
    ledger.done("/models/recorded", "/models/recorded (local)")
    export_ledger(ledger.to_file(), state.path / "ledger.json")
    ledger.close()
    with closing(sqlite3.connect(state.ledger)) as database:
        # a quarter of the size: every table takes a page, and there is little in it
        database.executescript("PRAGMA journal_mode = DELETE; PRAGMA page_size = 1024; VACUUM;")


def _round_record() -> RoundRecord:
    record = msgspec.structs.replace(
        example(RoundRecord), job_id=example(Standing).job_id, generation=0, round=0
    )
    # of a plain number of decimals, as records are written
    return msgspec.structs.replace(record, began=1_700_000_000.5)


def _write_journal(path: Path) -> None:
    """Of every machine, so that ``hypha replay --journal`` can run each of them again."""
    journal = Journal(checked=True)
    scene = Scene()
    scene.journal.entries.clear()
    scene.journal = journal
    scene.begin(scene.start)  # type: ignore[arg-type]
    scene.at(2).joined("ps", "a", "b")
    scene.at(3).loaded("ps", "a", "b")
    scene.at(4).started("a", "b")
    scene.trains(4.0, "a", "b").at(9)
    for name in ("a", "b"):
        scene.update(name)
    scene.applied("a", "b")
    need = Resources(cpu=1, memory=2)
    ask = Search("request", descriptor(), need, 1.0, 2.0, "tiny")
    allocator = Allocator([ask], journal=journal)
    allocator.handle(Want("train", 1), 100.0)
    arbiter = Arbiter(
        WorkerCapacity(Resources(cpu=2, memory=8), [descriptor()]),
        OfferConfig(),
        peer,
        lambda: LEASE,
        journal=journal,
    )
    asked = WorkerRequest(
        request_id="request",
        scheduler=peer("S"),
        resources=need,
        executor=descriptor(),
        count=1,
        bid=1.0,
        offer_within_s=0.5,
        dataset="tiny",
    )
    arbiter.handle(RequestReceived("S", asked), 100.0)
    [sent] = [action for action in arbiter.handle(Tick(), 100.3) if hasattr(action, "offer")]
    offer: WorkerOffer = sent.offer
    allocator.handle(Offered(PEER, offer), 100.35)
    allocator.handle(Tick(), 100.6)
    allocator.handle(Gained(LEASE), 100.7)
    arbiter.handle(RenewAsked(LEASE, "S"), 100.65)
    arbiter.handle(RenewAsked(LEASE, "S"), 100.7)
    renewal = Renewal(5.0, 100.6, Random(1), LEASE, journal)
    renewal.handle(Tick(), 100.6)
    renewal.handle(Renewed(30.0), 100.7)
    allocator.handle(LeaseFailed(LEASE), 140.0)
    write_entries(path, {"why": "recorded"}, tuple(journal.entries))


def _write_copy(into: Path, index: CheckpointIndex, source: Path) -> None:
    store = ReplicaStore(into, STORAGE)
    stamp = JobStamp(job_id=index.job_id, generation=1, round=ROUND)
    request = HoldCheckpoint(stamp=stamp, job=JOB, index=index)
    for name in store.hold(PEER, request, frozenset({PEER})):
        [file] = [one for one in index.files if one.name == name]
        meta = TransferMeta(
            kind="checkpoint", name=f"{ROUND}/{name}", size=file.size, blake3=file.blake3, stamp=stamp
        )
        shutil.copyfile(source / name, store.place_for(PEER, meta))
        store.arrived(PEER, meta)
    assert store.hold(PEER, request, frozenset({PEER})) == ()


def _write_cache(into: Path, dataset: Path) -> None:
    manifest = load_dataset_directory(dataset).manifest
    cache = SliceCache(into, CacheConfig())
    for index, part in enumerate(manifest.slices):
        assigned = SliceAssigned(
            dataset="tiny",
            index=index,
            epoch=0,
            samples=part.samples,
            size=part.size,
            blake3=part.blake3,
            providers=(),
        )
        shutil.copyfile(dataset / part.file, cache.incoming(assigned))
        cache.insert(assigned, cache.incoming(assigned))


def _write_announcement(into: Path) -> None:
    into.mkdir()
    announced = Message(type=Message.ADD_PROVIDER, key=key_of("tiny"))
    own = announced.providerPeers.add()
    own.id = ID.from_string(PEER).to_bytes()
    own.addrs.extend(Multiaddr(text).to_bytes() for text in peer().addresses)
    (into / "add-provider.bin").write_bytes(announced.SerializeToString())
