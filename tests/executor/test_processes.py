"""The two executors as real processes, speaking the bridge's HTTP."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from tests.executor.bridge_peer import Bridge, Network

from hypha.executor.replay import largest_difference, replay
from hypha.messages import (
    AggregateJob,
    Alive,
    CheckpointPolicy,
    CheckpointSaved,
    CloseRound,
    Contribution,
    ExecutorDescriptor,
    ExecutorError,
    Export,
    Exported,
    Finish,
    FinishedSpan,
    InnerOptimizer,
    JobStamp,
    LedgerFile,
    LedgerRound,
    Loaded,
    LrSchedule,
    Manifest,
    Members,
    ModelReady,
    ModelSpec,
    PeerRef,
    Peers,
    Plan,
    Progress,
    Rejoin,
    RoundApplied,
    RoundStarted,
    SaveCheckpoint,
    SendModel,
    SliceAssigned,
    SliceInfo,
    SliceRange,
    Traced,
    TrainJob,
    UpdateReceived,
    UpdateRefused,
    UpdateSent,
    encode_json,
)
from hypha.tracing import round_traceparent

# executors that are started take their time on a busy machine
pytestmark = pytest.mark.timeout(300)

ROWS, FEATURES, CLASSES = 50, 6, 3
#: a model without transformers: executors start in the time that torch takes
MODEL = ModelSpec(
    task="torch",
    entrypoint="torch.nn:Linear",
    arguments={"in_features": FEATURES, "out_features": CLASSES},
    inputs={"input": "x", "labels": "label"},
    loss="cross-entropy",
    seed=5,
)
SCHEDULER = PeerRef(peer="scheduler")
SERVER = PeerRef(peer="server")
TRACED = Traced(traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", ratio=1.0)


def train_job(me: str, **changes: object) -> TrainJob:
    values: dict[str, object] = {
        "job_id": "job",
        "generation": 0,
        "executor": ExecutorDescriptor(kind="train", name="diloco-transformer"),
        "me": me,
        "scheduler": SCHEDULER,
        "parameter_server": SERVER,
        "model": MODEL,
        "dataset": "toy",
        "batch_size": 8,
        "optimizer": InnerOptimizer(learning_rate=0.02),
        "seed": 3,
    }
    return TrainJob(**(values | changes))  # type: ignore[arg-type]


def server_job(**changes: object) -> AggregateJob:
    values: dict[str, object] = {
        "job_id": "job",
        "generation": 0,
        "executor": ExecutorDescriptor(kind="aggregate", name="parameter-server"),
        "me": "server",
        "scheduler": SCHEDULER,
        "model": MODEL,
        "checkpoint": CheckpointPolicy(every_rounds=2),
    }
    return AggregateJob(**(values | changes))  # type: ignore[arg-type]


def dataset(directory: Path, slices: int) -> Manifest:
    """Rows whose label is a linear function of them."""
    generator = np.random.default_rng(1)
    weights = generator.normal(size=(FEATURES, CLASSES))
    directory.mkdir()
    infos = []
    for index in range(slices):
        x = generator.normal(size=(ROWS, FEATURES)).astype(np.float32)
        columns = {"x": torch.from_numpy(x), "label": torch.from_numpy((x @ weights).argmax(1))}
        path = directory / f"slice-{index:04}.safetensors"
        save_file(columns, path)
        infos.append(SliceInfo(file=path.name, samples=ROWS, size=path.stat().st_size, blake3=""))
    return Manifest(name="toy", columns=(), slices=tuple(infos))


def give_slice(
    bridge: Bridge,
    manifest: Manifest,
    data: Path,
    index: int,
    epoch: int = 0,
    round_: int = 0,
    attempt: int = 0,
    generation: int = 0,
) -> None:
    assigned = SliceAssigned(
        dataset="toy", index=index, epoch=epoch, samples=ROWS, size=0, blake3="", providers=()
    )
    with bridge.lock:
        asked = JobStamp(job_id="job", generation=generation, round=round_, attempt=attempt)
        bridge.slices.append((assigned, data / manifest.slices[index].file, asked))
        bridge.lock.notify_all()


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    found = Network(tmp_path)
    yield found
    found.close()


@dataclass
class Finished:
    """A whole job, as its scheduler saw it."""

    network: Network
    ledger: LedgerFile
    data: Path
    exported: Exported
    contributions: list[Contribution]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """Two workers, five rounds, unequal plans, gradient accumulation, epochs; scheduled by hand."""
    directory = tmp_path_factory.mktemp("job")
    network = Network(directory)
    try:
        yield run_job(network, directory)
    finally:
        network.close()


def handed_in(worker: Bridge, server: Bridge, number: int, theta: str) -> Contribution:
    """The worker's part of the round, once the parameter server has it."""
    assert worker.wait(RoundStarted, lambda event: event.round == number).theta == theta
    received = server.wait(
        UpdateReceived, lambda event: (event.round, event.worker) == (number, worker.job.me)
    )
    assert received.contribution is not None
    return received.contribution


def applied_in(server: Bridge, number: int) -> RoundApplied:
    return server.wait(RoundApplied, lambda event: event.round == number)


def run_job(network: Network, directory: Path) -> Finished:
    manifest = dataset(directory / "data", 4)
    schedule = LrSchedule(kind="cosine-with-warmup", warmup_steps=2, training_steps=40)
    jobs = {
        me: train_job(me, schedule=schedule, gradient_accumulation=3, traced=TRACED)
        for me in ("first", "second")
    }
    server = network.add(server_job(traced=TRACED))
    workers = {me: network.add(job) for me, job in jobs.items()}
    for bridge in (server, *workers.values()):
        bridge.start(warm=False)
    for turn in range(8):
        for offset, bridge in enumerate(workers.values()):
            give_slice(
                bridge, manifest, directory / "data", (2 * turn + offset) % 4, (2 * turn + offset) // 4
            )
    members = tuple(PeerRef(peer=me) for me in workers)
    theta = server.wait(ModelReady).theta
    server.direct(Members(peers=members))
    for me, bridge in workers.items():
        bridge.wait(Loaded)
        bridge.direct(Plan(round=0))
        bridge.direct(Plan(round=0, batches={"first": 5, "second": 8}[me]))
        server.direct(SendModel(to=PeerRef(peer=me)))
    first = theta
    rounds, contributions = [], []
    plans = {"first": 5, "second": 8}
    for number in range(5):
        parts = {me: handed_in(bridge, server, number, theta) for me, bridge in workers.items()}
        for me, bridge in workers.items():
            # a toy's batch takes no time: the plan for the next round has to be there before theta is
            bridge.direct(Plan(round=number + 1, batches=plans[me]))
        server.direct(CloseRound(round=number, final=number == 4))
        applied = applied_in(server, number)
        assert sorted(applied.contributors) == ["first", "second"]
        theta = applied.theta
        # in the order in which they were added, as the scheduler's ledger has them
        added = tuple(parts[worker] for worker in applied.contributors)
        rounds.append(LedgerRound(round=number, theta=theta, contributors=added))
        contributions += parts.values()
    server.direct(Export(to=SCHEDULER))
    exported = server.wait(Exported)
    server.wait(CheckpointSaved, lambda event: event.round == 5)
    for bridge in (server, *workers.values()):
        bridge.direct(Finish())
    codes = [bridge.exit_code() for bridge in (server, *workers.values())]
    assert codes == [0, 0, 0], [bridge.output() for bridge in (server, *workers.values())]
    ledger = LedgerFile(
        job=jobs["first"],
        aggregate=server_job(),
        manifest=manifest,
        manifest_hash="",
        theta=first,
        rounds=tuple(rounds),
    )
    return Finished(network, ledger, directory / "data", exported, contributions)


def spans_of(job: Finished, me: str, name: str) -> list[FinishedSpan]:
    return [span for span in job.network.bridges[me].spans if span.name == name]


def in_round(span: FinishedSpan, number: int) -> bool:
    """Is it a child of that round's span, which the scheduler makes?"""
    return round_traceparent("job", 0, number, 1.0) == f"00-{span.trace_id}-{span.parent_id}-01"


def test_every_operation_of_a_round_is_a_span_in_that_rounds_trace(finished: Finished) -> None:
    for me in ("first", "second"):
        for name in ("Load weights", "Train", "Send update"):
            spans = spans_of(finished, me, name)
            assert [in_round(span, number) for number, span in enumerate(spans)] == [True] * 5
        for number, span in enumerate(spans_of(finished, me, "Train")):
            part = next(part for part in finished.contributions if (part.worker, part.round) == (me, number))
            assert span.attributes["hypha.samples"] == part.samples
            assert span.attributes["hypha.round"] == number
    received = spans_of(finished, "server", "Receive update")
    assert len(received) == 10
    assert {span.attributes["hypha.peer"] for span in received} == {"first", "second"}
    closed = spans_of(finished, "server", "Outer step")
    assert [in_round(span, number) for number, span in enumerate(closed)] == [True] * 5
    # theta of the first round goes to each as it has loaded its model, of the last one to nobody
    sent = spans_of(finished, "server", "Broadcast weights")
    assert sorted(span.attributes["hypha.round"] for span in sent) == [0, 0, 1, 2, 3, 4]
    # every second round, and the last one
    saved = spans_of(finished, "server", "Save checkpoint")
    assert [span.attributes["hypha.checkpoint.round"] for span in saved] == [2, 4, 5]
    assert all(in_round(span, number) for span, number in zip(saved, (1, 3, 4), strict=True))


def test_what_is_of_no_round_is_below_the_dispatch(finished: Finished) -> None:
    for me in ("first", "second", "server"):
        (loaded,) = spans_of(finished, me, "Load model")
        assert f"00-{loaded.trace_id}-{loaded.parent_id}-01" == TRACED.traceparent
        assert loaded.status == "unset"
    (exported,) = spans_of(finished, "server", "Export model")
    assert f"00-{exported.trace_id}-{exported.parent_id}-01" == TRACED.traceparent


def test_the_worker_is_told_in_which_span_it_was_called(finished: Finished) -> None:
    bridge = finished.network.bridges["first"]
    calls = {
        f"00-{span.trace_id}-{span.span_id}-01": span for span in spans_of(finished, "first", "Bridge call")
    }
    sent = bridge.called_in["/resources/send"]
    assert len(sent) == 5
    updates = {span.span_id for span in spans_of(finished, "first", "Send update")}
    assert {calls[parent or ""].parent_id for parent in sent} == updates
    # progress is of no span: there is too much of it
    assert None in bridge.called_in["/status/send"]
    for parent in bridge.called_in["/status/send"]:
        assert parent is None or parent.split("-")[1] in {span.trace_id for span in bridge.spans}


def exported_model(job: Finished) -> Path:
    return job.network.scheduler / "export" / "5"


def test_a_job_can_be_replayed_from_its_ledger(finished: Finished) -> None:
    again = replay(finished.ledger, finished.data)
    assert len(again.hashes) == 6
    assert again.hashes[0] == finished.ledger.theta
    assert len(set(again.hashes)) == 6
    assert again.hashes[1:] == [entry.theta for entry in finished.ledger.rounds]
    final = load_file(exported_model(finished) / "model.safetensors")
    assert largest_difference(again.theta, final) == 0.0


def test_batches_that_may_grow_do_from_round_to_round_and_can_be_replayed(
    network: Network, tmp_path: Path
) -> None:
    manifest = dataset(tmp_path / "data", 4)
    job = train_job("first", most_batch_size=20)
    server, worker = network.add(server_job()), network.add(job)
    for bridge in (server, worker):
        bridge.start()
    for index in range(4):
        give_slice(worker, manifest, tmp_path / "data", index)
    first = theta = server.wait(ModelReady).theta
    server.direct(Members(peers=(PeerRef(peer="first"),)))
    worker.wait(Loaded)
    worker.direct(Plan(round=0, batches=4))
    server.direct(SendModel(to=PeerRef(peer="first")))
    rounds = []
    # a batch takes as long as the test's pace, however many rows it has
    for number, rows in enumerate((8, 16, 20)):
        part = handed_in(worker, server, number, theta)
        assert worker.wait(RoundStarted, lambda event, at=number: event.round == at).batch_size == rows
        assert (part.batch_size, part.batches, part.samples) == (rows, 4, 4 * rows)
        worker.direct(Plan(round=number + 1, batches=4))
        server.direct(CloseRound(round=number, final=number == 2))
        theta = applied_in(server, number).theta
        rounds.append(LedgerRound(round=number, theta=theta, contributors=(part,)))
    worker.direct(Finish())
    assert worker.exit_code() == 0
    ledger = LedgerFile(
        job=job,
        aggregate=server_job(),
        manifest=manifest,
        manifest_hash="",
        theta=first,
        rounds=tuple(rounds),
    )
    assert replay(ledger, tmp_path / "data").hashes == [first, *(entry.theta for entry in rounds)]


def test_what_was_trained_on_is_told_sample_by_sample(finished: Finished) -> None:
    for part in finished.contributions:
        rows = sum(piece.stop - piece.start for piece in part.ranges)
        assert part.batches == {"first": 5, "second": 8}[part.worker]
        assert rows == part.samples == 8 * part.batches
    for me in ("first", "second"):
        mine = [part for part in finished.contributions if part.worker == me]
        # accumulation of 3: 5 batches are 2 steps, 8 are 3; both with a smaller last one
        assert [part.steps for part in mine] == [{"first": 2, "second": 3}[me] * n for n in range(5)]
        seen = [
            (p.epoch, p.slice, row) for part in mine for p in part.ranges for row in range(p.start, p.stop)
        ]
        assert len(seen) == len(set(seen))
        done = [pair for part in mine for pair in part.finished]
        assert len(done) == len(seen) // ROWS


def test_the_trained_model_is_exported_and_learnt_something(finished: Finished) -> None:
    assert finished.exported.files == ("config.json", "model.safetensors")
    model = torch.nn.Linear(FEATURES, CLASSES)
    model.load_state_dict(load_file(exported_model(finished) / "model.safetensors"))
    columns = load_file(finished.data / "slice-0000.safetensors")
    accuracy = (model(columns["x"]).argmax(1) == columns["label"]).float().mean()
    assert float(accuracy) > 0.7


def test_checkpoints_came_every_two_rounds_and_at_the_end(finished: Finished) -> None:
    kept = finished.network.scheduler / "checkpoint"
    assert sorted(path.name for path in kept.iterdir()) == ["2", "4", "5"]
    for path in kept.iterdir():
        assert {file.name for file in path.iterdir()} == {
            "theta.safetensors",
            "momentum.safetensors",
            "state.json",
        }


def test_no_file_is_left_over(finished: Finished) -> None:
    for bridge in finished.network.bridges.values():
        left = [path for part in ("incoming", "outgoing") for path in (bridge.directory / part).rglob("*")]
        spare = [path for path in left if path.is_file() and path.parent.name == ".spare"]
        assert len(spare) <= 3
        left = [path for path in left if path.is_file() and path not in spare]
        # theta of the last round, which nothing follows, and at most the last update
        last = {"theta-5.safetensors"} if bridge.job.me == "server" else {"update-4-0.safetensors"}
        assert {path.name for path in left} <= last
        assert len(list((bridge.directory / "artifacts").rglob("slice-*"))) <= 1


def test_progress_grows_and_ends_at_the_plan(finished: Finished) -> None:
    events = finished.network.bridges["second"].events
    told = [event for event in events if isinstance(event, Progress) and event.round == 3]
    assert [event.batches for event in told] == sorted({event.batches for event in told})
    assert told[-1].batches == 8
    assert told[-1].samples == 64
    assert told[-1].busy_s > 0
    # the last progress of a round is told before its update, whose acknowledgement theta may overtake
    at = next(at for at, event in enumerate(events) if isinstance(event, UpdateSent))
    first = events[at].contribution.round
    assert any(isinstance(event, Progress) and event.round == first for event in events[:at])
    assert not any(isinstance(event, Progress) and event.round == first for event in events[at:])


def test_a_parameter_server_goes_on_from_a_checkpoint(finished: Finished, network: Network) -> None:
    """The fourth round is applied again, from the checkpoint after the second, and gives the same theta."""
    kept = finished.network.scheduler / "checkpoint" / "4"
    restore = Peers(peers=(SCHEDULER,), resource="checkpoint/4")
    server = network.add(server_job(restore=restore, round=4, generation=1), **{"checkpoint/4": kept})
    server.start()
    ready = server.wait(ModelReady)
    assert ready.round == 4
    assert ready.theta == finished.ledger.rounds[3].theta
    # a round without updates is applied, changes nothing, and says so
    server.direct(CloseRound(round=4))
    applied = server.wait(RoundApplied)
    assert applied.contributors == ()
    assert applied.theta == ready.theta
    # no checkpoint is due; asked for one it saves what it began the round with, once
    server.direct(SaveCheckpoint(round=5))
    server.wait(CheckpointSaved)
    saved = network.scheduler / "checkpoint" / "5"
    sent_at = (saved / "theta.safetensors").stat().st_mtime_ns
    server.direct(SaveCheckpoint(round=5))
    server.wait(
        CheckpointSaved, lambda _: sum(isinstance(one, CheckpointSaved) for one in server.events) == 2
    )
    assert (saved / "theta.safetensors").stat().st_mtime_ns == sent_at
    assert blake3((saved / "theta.safetensors").read_bytes()).hexdigest() == ready.theta
    assert (saved / "momentum.safetensors").read_bytes() == (kept / "momentum.safetensors").read_bytes()
    assert json.loads((saved / "state.json").read_bytes())["round"] == 5
    # only now is a model built, and what is in it is what was restored
    server.direct(Export(to=SCHEDULER))
    exported = server.wait(Exported)
    assert exported.files == ("config.json", "model.safetensors")
    made = load_file(network.scheduler / "export" / "5" / "model.safetensors")
    for name, value in load_file(kept / "theta.safetensors").items():
        assert torch.equal(made[name], value)
    server.direct(Finish())
    assert server.exit_code() == 0


def test_a_damaged_checkpoint_is_not_used(finished: Finished, network: Network, tmp_path: Path) -> None:
    kept = tmp_path / "damaged"
    kept.mkdir()
    for path in (finished.network.scheduler / "checkpoint" / "4").iterdir():
        data = path.read_bytes()
        if path.name == "momentum.safetensors":
            data = data[:-1] + bytes([data[-1] ^ 1])
        (kept / path.name).write_bytes(data)
    restore = Peers(peers=(SCHEDULER,), resource="checkpoint/4")
    server = network.add(server_job(restore=restore, round=4), **{"checkpoint/4": kept})
    server.start()
    error = server.wait(ExecutorError)
    assert error.kind == "checkpoint"
    assert "momentum.safetensors" in error.message
    assert server.exit_code() == 1


def test_refusals_of_a_parameter_server(network: Network, tmp_path: Path) -> None:
    server = network.add(
        server_job(checkpoint=CheckpointPolicy(every_rounds=1, place=str(tmp_path / "kept")))
    )
    server.start()
    theta = server.wait(ModelReady).theta
    good = {"weight": torch.ones(CLASSES, FEATURES), "bias": torch.ones(CLASSES)}
    states = {
        "good": good,
        "nan": good | {"bias": torch.full((CLASSES,), float("nan"))},
        "lacking": {"weight": good["weight"]},
    }

    def update(worker: str, name: str, round_: int, samples: int = 10) -> Path:
        part = Contribution(
            round=round_,
            worker=worker,
            incarnation="i",
            samples=samples,
            batches=10,
            batch_size=1,
            steps=0,
            ranges=(SliceRange(epoch=0, slice=0, start=0, stop=samples),),
        )
        path = tmp_path / name
        path.write_bytes(b"?" * 100)
        if name in states:
            save_file(states[name], path, {"contribution": encode_json(part).decode()})
        elif name == "silent":
            save_file(good, path)
        return path

    stamp = JobStamp(job_id="job", generation=0, round=0)

    def refused(worker: str, name: str, stamp: JobStamp, samples: int = 10) -> str:
        path = update(worker, name, stamp.round, samples)
        file = server.deliver("update", worker, path, stamp)
        before = len([event for event in server.events if isinstance(event, UpdateRefused)])
        server.wait(
            UpdateRefused,
            lambda event: [e for e in server.events if isinstance(e, UpdateRefused)].index(event) >= before,
        )
        told = [event for event in server.events if isinstance(event, UpdateRefused)][-1]
        assert told.worker == worker
        # it says so first and deletes then
        deadline = time.monotonic() + 60.0
        while (server.directory / file.path).exists():
            assert time.monotonic() < deadline, "a refused update stays on disk"
            time.sleep(0.01)
        return told.code

    # before it is known who takes part an update waits; then it counts
    server.deliver("update", "a", update("a", "good", 0), stamp)
    server.direct(Members(peers=(PeerRef(peer="a"), PeerRef(peer="b"))))
    server.wait(UpdateReceived, lambda event: event.worker == "a")
    assert refused("a", "good", stamp) == "duplicate"
    assert refused("stranger", "good", stamp) == "uninvited"
    assert refused("b", "good", JobStamp(job_id="job", generation=0, round=1)) == "stale"
    assert refused("b", "good", JobStamp(job_id="job", generation=-1, round=0)) == "stale"
    assert refused("b", "good", JobStamp(job_id="other", generation=0, round=0)) == "uninvited"
    assert refused("b", "nan", stamp) == "invalid"
    assert refused("b", "lacking", stamp) == "invalid"
    assert refused("b", "garbage", stamp) == "invalid"
    # as a worker of another version may send it
    assert refused("b", "silent", stamp) == "invalid"
    assert "upgrade Hypha on its worker" in server.events[-1].reason
    assert refused("b", "good", stamp, samples=0) == "invalid"
    server.direct(CloseRound(round=0))
    applied = server.wait(RoundApplied)
    assert applied.contributors == ("a",)
    assert applied.theta != theta
    assert refused("b", "good", stamp) == "stale"
    # closing it again says the same again, and applies nothing
    server.direct(CloseRound(round=0))
    server.wait(RoundApplied, lambda event: server.events.count(event) == 2)
    server.direct(CloseRound(round=7))
    server.deliver("update", "b", update("b", "good", 1), JobStamp(job_id="job", round=1))
    server.wait(UpdateReceived, lambda event: event.worker == "b")
    assert [event for event in server.events if isinstance(event, RoundApplied)] == [applied, applied]
    saved = server.wait(CheckpointSaved)
    assert saved.place == str(tmp_path / "kept" / "job" / "1")
    assert load_file(Path(saved.place) / "theta.safetensors").keys() == good.keys()
    # another scheduler is told all of it: the last round with its updates, and what is in the open one
    server.direct(Rejoin(generation=1, round=0))
    server.wait(RoundApplied, lambda event: server.events.count(event) == 3)
    again = [event for event in server.events if isinstance(event, UpdateReceived | RoundApplied)]
    while not isinstance(again[-1], RoundApplied):
        again.pop()  # of the open round
    assert isinstance(again[-2], UpdateReceived)
    assert again[-2].worker == "a"
    server.wait(CheckpointSaved, lambda event: server.events.count(event) == 2)
    ready = server.wait(ModelReady, lambda event: event.round == 1)
    assert ready.theta == applied.theta
    server.wait(UpdateReceived, lambda event: event.worker == "b" and server.events.count(event) == 2)
    # theta for another attempt says so
    joiner = network.add(train_job("b"))
    server.direct(SendModel(to=PeerRef(peer="b"), attempt=2))
    with joiner.lock:
        assert joiner.lock.wait_for(lambda: bool(joiner.arrivals), 30)
    stamp = joiner.arrivals[0].meta.stamp
    assert stamp is not None
    assert (stamp.round, stamp.attempt) == (1, 2)
    # theta went to nobody else, as nobody can be reached, and the server is well
    server.direct(Finish())
    assert server.exit_code() == 0


def test_a_worker_that_was_left_out_starts_over(network: Network, tmp_path: Path) -> None:
    manifest = dataset(tmp_path / "data", 4)
    worker = network.add(train_job("me"))
    worker.start()
    worker.wait(Loaded)
    theta = {"weight": torch.zeros(CLASSES, FEATURES), "bias": torch.zeros(CLASSES)}
    save_file(theta, tmp_path / "theta-0")
    save_file(theta | {"bias": torch.ones(CLASSES)}, tmp_path / "theta-1")
    worker.deliver("theta", "server", tmp_path / "theta-0", JobStamp(job_id="job", round=0))
    worker.wait(RoundStarted)
    give_slice(worker, manifest, tmp_path / "data", 0)
    give_slice(worker, manifest, tmp_path / "data", 1)
    # starved in the middle of the round: 100 rows are 12 batches and 4 rows
    worker.wait(Progress, lambda event: event.batches >= 12)
    give_slice(worker, manifest, tmp_path / "data", 2, round_=1)
    # theta of the open round once more changes nothing but that it is said again
    worker.deliver("theta", "server", tmp_path / "theta-0", JobStamp(job_id="job", round=0))
    worker.wait(RoundStarted, lambda event: worker.events.count(event) == 2)
    worker.wait(Progress, lambda event: event.batches >= 18)
    # long before there are rows for more batches than these
    worker.direct(Plan(round=1, batches=9))
    worker.deliver(
        "theta", "server", tmp_path / "theta-1", JobStamp(job_id="job", round=1), contributors=("other",)
    )
    worker.wait(RoundStarted, lambda event: event.round == 1)
    # a late theta of the round before is no reason to go back
    late = worker.deliver("theta", "server", tmp_path / "theta-0", JobStamp(job_id="job", round=0))
    give_slice(worker, manifest, tmp_path / "data", 3, round_=1)
    worker.refusals["update"] = deque([(502, "unreachable"), (409, "busy"), (409, "not-found")])
    network.add(server_job())
    sent = worker.wait(UpdateSent).contribution
    assert (sent.round, sent.batches, sent.restarts, sent.steps) == (1, 9, 1, 0)
    # the slice asked for in round 1 is used from its first row on, those of round 0 not at all
    assert [(piece.slice, piece.start, piece.stop) for piece in sent.ranges] == [(2, 0, 50), (3, 0, 22)]
    assert sent.finished == ((0, 2),)
    assert not (worker.directory / late.path).exists()
    # a new parameter server gets the update of the open round as well
    other = network.add(server_job(me="elsewhere"))
    there = PeerRef(peer="elsewhere")
    worker.direct(Rejoin(generation=1, round=1, parameter_server=there, resend=True))
    worker.wait(UpdateSent, lambda event: worker.events.count(event) == 2)
    worker.wait(RoundStarted, lambda event: event.round == 1 and worker.events.count(event) == 2)
    worker.wait(Loaded, lambda event: worker.events.count(event) == 2)
    assert [file.meta.samples for file in other.arrivals] == [72]
    assert load_file(other.directory / other.arrivals[0].path)["weight"].abs().sum() > 0
    # another scheduler is only told that it is there
    worker.direct(Rejoin(generation=2, round=1, parameter_server=there))
    worker.wait(UpdateSent, lambda event: worker.events.count(event) == 3)
    worker.wait(RoundStarted, lambda event: event.round == 1 and worker.events.count(event) == 3)
    # said again, as after a broken stream, it is nothing new
    worker.direct(Rejoin(generation=2, round=1, parameter_server=there))
    assert len(other.arrivals) == 1
    # from an earlier round everything begins anew: theta of the life before is refused, steps are forgotten
    worker.direct(Rejoin(generation=3, round=0, parameter_server=there, resend=True, start_over=True))
    worker.wait(Loaded, lambda event: worker.events.count(event) == 4)
    worker.direct(Plan(round=0, batches=2))
    stale = worker.deliver("theta", "elsewhere", tmp_path / "theta-1", JobStamp(job_id="job", round=2))
    worker.deliver("theta", "elsewhere", tmp_path / "theta-0", JobStamp(job_id="job", generation=3, round=0))
    worker.wait(RoundStarted, lambda event: event.round == 0 and worker.events.count(event) == 3)
    give_slice(worker, manifest, tmp_path / "data", 0, generation=3)
    again = worker.wait(UpdateSent, lambda event: event.contribution.restarts == 2).contribution
    assert (again.round, again.batches, again.steps) == (0, 2, 0)
    assert [(piece.slice, piece.start, piece.stop) for piece in again.ranges] == [(0, 0, 16)]
    assert not (worker.directory / stale.path).exists()
    worker.direct(Finish())
    assert worker.exit_code() == 0
    assert worker.output().count("Traceback") == 0


def test_slices_fetched_for_a_first_round_are_dropped_when_the_job_restarts_before_it(
    network: Network, tmp_path: Path
) -> None:
    manifest = dataset(tmp_path / "data", 2)
    worker = network.add(train_job("me"))
    network.add(server_job())
    worker.start()
    worker.wait(Loaded)
    give_slice(worker, manifest, tmp_path / "data", 0)
    with worker.lock:
        assert worker.lock.wait_for(lambda: not worker.slices, 30)
    # rounds were lost: the scheduler has taken back all slices
    there = PeerRef(peer="server")
    worker.direct(Rejoin(generation=1, round=0, parameter_server=there, resend=True, start_over=True))
    worker.wait(Loaded, lambda event: worker.events.count(event) == 2)
    give_slice(worker, manifest, tmp_path / "data", 1, generation=1)
    save_file({"weight": torch.zeros(CLASSES, FEATURES), "bias": torch.zeros(CLASSES)}, tmp_path / "theta-0")
    worker.direct(Plan(round=0, batches=2))
    worker.deliver("theta", "server", tmp_path / "theta-0", JobStamp(job_id="job", generation=1, round=0))
    sent = worker.wait(UpdateSent).contribution
    assert [(piece.slice, piece.start, piece.stop) for piece in sent.ranges] == [(1, 0, 16)]
    worker.direct(Finish())
    assert worker.exit_code() == 0


def test_a_worker_whose_update_was_refused_begins_the_round_anew(network: Network, tmp_path: Path) -> None:
    manifest = dataset(tmp_path / "data", 3)
    worker, server = network.add(train_job("me")), network.add(server_job())
    worker.start()
    theta = {"weight": torch.zeros(CLASSES, FEATURES), "bias": torch.zeros(CLASSES)}
    save_file(theta, tmp_path / "theta")
    worker.direct(Plan(round=0, batches=3))
    worker.deliver("theta", "server", tmp_path / "theta", JobStamp(job_id="job"))
    worker.wait(RoundStarted)
    give_slice(worker, manifest, tmp_path / "data", 0)
    first = worker.wait(UpdateSent).contribution
    # the same theta again, as after a lost word, changes nothing: the update may be in
    worker.deliver("theta", "server", tmp_path / "theta", JobStamp(job_id="job"))
    worker.wait(RoundStarted, lambda event: worker.events.count(event) == 2)
    # as another attempt it voids the round: slices, optimizer and counts begin anew
    worker.deliver("theta", "server", tmp_path / "theta", JobStamp(job_id="job", attempt=1))
    worker.wait(RoundStarted, lambda event: event.attempt == 1)
    # a repetition of the attempt before comes too late to matter, one of this attempt starts nothing over
    late = worker.deliver("theta", "server", tmp_path / "theta", JobStamp(job_id="job"))
    give_slice(worker, manifest, tmp_path / "data", 1)
    give_slice(worker, manifest, tmp_path / "data", 2, attempt=1)
    second = worker.wait(UpdateSent, lambda event: event.contribution.attempt == 1).contribution
    assert [(piece.slice, piece.start, piece.stop) for piece in first.ranges] == [(0, 0, 24)]
    assert [(piece.slice, piece.start, piece.stop) for piece in second.ranges] == [(2, 0, 24)]
    assert (second.round, second.batches, second.restarts, second.steps) == (0, 3, 1, 0)
    assert not (worker.directory / late.path).exists()
    worker.deliver("theta", "server", tmp_path / "theta", JobStamp(job_id="job", attempt=1))
    worker.wait(RoundStarted, lambda event: event.attempt == 1 and worker.events.count(event) == 2)
    assert [file.meta.samples for file in server.arrivals] == [24, 24]
    worker.direct(Finish())
    assert worker.exit_code() == 0
    assert sum(isinstance(event, UpdateSent) for event in worker.events) == 2


def test_a_loss_that_is_not_finite_ends_the_executor(network: Network, tmp_path: Path) -> None:
    worker = network.add(train_job("me"))
    worker.start()
    save_file(
        {"x": torch.full((ROWS, FEATURES), float("nan")), "label": torch.zeros(ROWS).long()},
        tmp_path / "slice",
    )
    assigned = SliceAssigned(dataset="toy", index=0, epoch=0, samples=ROWS, size=0, blake3="", providers=())
    worker.slices.append((assigned, tmp_path / "slice", JobStamp(job_id="job")))
    theta = {"weight": torch.zeros(CLASSES, FEATURES), "bias": torch.zeros(CLASSES)}
    save_file(theta, tmp_path / "theta")
    worker.deliver("theta", "server", tmp_path / "theta", JobStamp(job_id="job", round=0))
    worker.wait(ExecutorError, lambda event: event.kind == "not-finite")
    assert worker.exit_code() == 5


STUCK = """
import pathlib, time, torch

class Stuck(torch.nn.Linear):
    def forward(self, input):
        pathlib.Path("stuck").touch()
        while True:
            time.sleep(0.01)
"""


def test_who_waits_says_so_and_who_is_stuck_does_not(network: Network, tmp_path: Path) -> None:
    manifest = dataset(tmp_path / "data", 1)
    server, waiting = network.add(server_job()), network.add(train_job("me"))
    model = msgspec.structs.replace(MODEL, entrypoint="stuck_model:Stuck")
    stuck = network.add(train_job("stuck", model=model))
    (stuck.directory / "stuck_model.py").write_text(STUCK)
    for bridge in (server, waiting, stuck):
        bridge.start()

    def told(bridge: Bridge) -> int:
        return sum(isinstance(event, Alive) for event in bridge.events)

    def alive(times: int, *bridges: Bridge) -> None:
        """So often from now on."""
        for bridge, before in [(bridge, told(bridge)) for bridge in bridges]:
            bridge.wait(Alive, lambda _, bridge=bridge, before=before: told(bridge) >= before + times)

    # for updates, for theta, for data
    server.wait(ModelReady)
    waiting.wait(Loaded)
    alive(2, server, waiting)
    theta = {"weight": torch.zeros(CLASSES, FEATURES), "bias": torch.zeros(CLASSES)}
    save_file(theta, tmp_path / "theta")
    for bridge in (waiting, stuck):
        bridge.deliver("theta", "server", tmp_path / "theta", JobStamp(job_id="job", round=0))
    waiting.wait(RoundStarted)
    alive(2, waiting)
    # in a batch
    give_slice(stuck, manifest, tmp_path / "data", 0)
    stuck.wait(RoundStarted)
    deadline = time.monotonic() + 60
    while not (stuck.directory / "stuck").exists():
        assert time.monotonic() < deadline, stuck.output()
        time.sleep(0.02)
    # what it said a moment before may be under way
    alive(1, waiting)
    before = len(stuck.events)
    alive(2, waiting)
    assert len(stuck.events) == before
    for bridge in (server, waiting):
        bridge.direct(Finish())
        assert bridge.exit_code() == 0


def test_models_and_data_that_do_not_fit_are_named(network: Network, tmp_path: Path) -> None:
    wrong = ModelSpec(task="torch", entrypoint="torch.nn:Sparse", loss="mse")
    server = network.add(server_job(model=wrong))
    corrupt = network.add(train_job("corrupt"))
    for bridge in (server, corrupt):
        bridge.start()
    assert "torch.nn:Sparse" in server.wait(ExecutorError, lambda event: event.kind == "model").message
    assert server.exit_code() == 5
    (tmp_path / "slice").write_bytes(b"not a slice")
    assigned = SliceAssigned(dataset="toy", index=0, epoch=0, samples=ROWS, size=0, blake3="", providers=())
    corrupt.slices.append((assigned, tmp_path / "slice", JobStamp(job_id="job")))
    with corrupt.lock:
        corrupt.lock.notify_all()
    theta = {"weight": torch.zeros(CLASSES, FEATURES), "bias": torch.zeros(CLASSES)}
    save_file(theta, tmp_path / "theta")
    corrupt.deliver("theta", "server", tmp_path / "theta", JobStamp(job_id="job", round=0))
    assert "slice" in corrupt.wait(ExecutorError, lambda event: event.kind == "data").message
    assert corrupt.exit_code() == 1
