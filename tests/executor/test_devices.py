"""An executor of several processes: two on the CPU, as ``accelerate launch`` starts them, against one."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.executor.bridge_peer import Bridge, Network
from tests.executor.test_processes import (
    SCHEDULER,
    applied_in,
    give_slice,
    handed_in,
    server_job,
    train_job,
)

from hypha.errors import ConfigError, ModelError
from hypha.executor.inner.slices_reader import slice_order
from hypha.executor.inner.spread_model import shard
from hypha.executor.launch import launch_arguments
from hypha.executor.replay import largest_difference, replay
from hypha.messages import (
    CloseRound,
    ExecutorError,
    Export,
    Exported,
    Finish,
    InnerOptimizer,
    LedgerFile,
    LedgerRound,
    Loaded,
    Manifest,
    Members,
    ModelReady,
    ModelSpec,
    PeerRef,
    Plan,
    SendModel,
    SliceInfo,
    TrainJob,
)

pytestmark = pytest.mark.timeout(300)

#: three layers of sizes that two processes cannot halve, and dropout that is off
LAYERS = """
from torch import nn

def make() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.0), nn.Linear(5, 3, bias=False), Scale())

class Scale(nn.Linear):
    def __init__(self):
        super().__init__(3, 3)
"""
MODEL = ModelSpec(
    task="torch",
    entrypoint="layers:make",
    inputs={"input": "x", "labels": "label"},
    loss="cross-entropy",
    seed=5,
)
ROWS = 50


def rows_of(directory: Path, slices: int) -> Manifest:
    """Two labels in five do not count, in some batches none of what one process has."""
    generator = torch.Generator().manual_seed(1)
    directory.mkdir()
    infos = []
    for index in range(slices):
        label = torch.randint(0, 3, (ROWS,), generator=generator)
        label[torch.rand(ROWS, generator=generator) < 0.4] = -100
        label[:7] = torch.tensor([-100, -100, -100, 0, 1, -100, 2])
        path = directory / f"slice-{index:04}.safetensors"
        save_file({"x": torch.randn(ROWS, 6, generator=generator), "label": label}, path)
        infos.append(SliceInfo(file=path.name, samples=ROWS, size=path.stat().st_size, blake3=""))
    return Manifest(name="toy", columns=(), slices=tuple(infos))


def configuration(directory: Path, kind: str) -> Path:
    """As ``accelerate config`` writes it."""
    path = directory / f"{kind}.yaml"
    sharded = (
        "fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, "
        "fsdp_transformer_layer_cls_to_wrap: Scale}\n"
    )
    path.write_text(
        f"compute_environment: LOCAL_MACHINE\ndistributed_type: {kind}\nnum_machines: 1\nnum_processes: 2\n"
        f"use_cpu: true\nmixed_precision: 'no'\n{sharded if kind == 'FSDP' else ''}"
    )
    return path


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    (tmp_path / "layers.py").write_text(LAYERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "layers", raising=False)
    found = Network(tmp_path)
    yield found
    found.close()


def begun(network: Network, job: TrainJob, kind: str) -> tuple[Bridge, Bridge, Manifest, str]:
    """The parameter server, the worker, the dataset, and the hash of theta, which the worker is sent."""
    manifest = rows_of(network.directory / "data", 4)
    server, worker = network.add(server_job(model=MODEL)), network.add(job)
    for bridge in (server, worker):
        (bridge.directory / "layers.py").write_text(LAYERS)
    server.start()
    worker.start(accelerate=configuration(network.directory, kind))
    for index in range(4):
        give_slice(worker, manifest, network.directory / "data", index)
    theta = server.wait(ModelReady).theta
    server.direct(Members(peers=(PeerRef(peer="first"),)))
    worker.wait(Loaded)
    worker.direct(Plan(round=0, batches=5))
    server.direct(SendModel(to=PeerRef(peer="first")))
    return server, worker, manifest, theta


def dies_as_one(worker: Bridge) -> None:
    """One of its processes is killed: all end, and the output says which it was."""
    assert worker.process is not None
    below = psutil.Process(worker.process.pid).children(recursive=True)
    training = [one for one in below if "hypha.executor.training" in one.cmdline()]
    (second,) = (one for one in training if one.environ()["RANK"] == "1")
    second.kill()
    assert worker.exit_code() == 128 + signal.SIGKILL
    assert worker.output().rstrip().endswith("process 1 of 2 was ended by SIGKILL")
    assert len(training) == 2
    assert not any(one.is_running() for one in training)


@pytest.mark.parametrize("kind", ["MULTI_CPU", "FSDP"])
def test_two_processes_train_as_one_does_on_the_same_batches(network: Network, kind: str) -> None:
    """The replay of their ledger is one process, with the whole batch."""
    # 7 rows are 3 and 4; 5 batches are two steps and a smaller one
    job = train_job(
        "first",
        model=MODEL,
        batch_size=7,
        gradient_accumulation=2,
        optimizer=InnerOptimizer(learning_rate=0.02, max_grad_norm=0.5),
    )
    server, worker, manifest, theta = begun(network, job, kind)
    first, rounds = theta, []
    for number in range(3):
        part = handed_in(worker, server, number, theta)
        assert (part.batches, part.samples, part.steps) == (5, 35, 3 * number)
        worker.direct(Plan(round=number + 1, batches=5))
        server.direct(CloseRound(round=number, final=number == 2))
        theta = applied_in(server, number).theta
        rounds.append(LedgerRound(round=number, theta=theta, contributors=(part,)))
    server.direct(Export(to=SCHEDULER))
    server.wait(Exported)
    if kind == "FSDP":
        dies_as_one(worker)
    else:
        worker.direct(Finish())
        assert worker.exit_code() == 0, worker.output()
    assert "trained by 2 processes, each with " + ("a part" if kind == "FSDP" else "all") in worker.output()
    # the only process's updates are applied as they are: theta of the last round is its local model
    ledger = LedgerFile(
        job=job,
        aggregate=server_job(model=MODEL),
        manifest=manifest,
        manifest_hash="",
        theta=first,
        rounds=tuple(rounds),
    )
    again = replay(ledger, network.directory / "data")
    assert again.hashes[0] == first
    final = load_file(network.scheduler / "export" / "3" / "model.safetensors")
    assert largest_difference(again.theta, final) < 1e-5


def test_what_one_process_cannot_do_is_the_executors_failure_with_that_ones_words(network: Network) -> None:
    manifest = rows_of(network.directory / "data", 1)
    columns = load_file(network.directory / "data" / manifest.slices[0].file)
    # in the order of this job the last row of the first batch is that of the second process
    row = int(slice_order(3, 0, 0, ROWS)[6])
    columns["label"][row] = 77
    save_file(columns, network.directory / "data" / manifest.slices[0].file)
    server = network.add(server_job(model=MODEL))
    worker = network.add(train_job("first", model=MODEL, batch_size=7))
    for bridge in (server, worker):
        (bridge.directory / "layers.py").write_text(LAYERS)
    server.start()
    worker.start(accelerate=configuration(network.directory, "MULTI_CPU"))
    give_slice(worker, manifest, network.directory / "data", 0)
    server.wait(ModelReady)
    server.direct(Members(peers=(PeerRef(peer="first"),)))
    worker.wait(Loaded)
    server.direct(SendModel(to=PeerRef(peer="first")))
    error = worker.wait(ExecutorError)
    assert error.kind == "batch"
    assert "77" in error.message.splitlines()[0]
    assert worker.exit_code() not in (0, 128 + signal.SIGTERM)
    assert "process 1 of 2: " in worker.output().splitlines()[-1]
    assert [one for one in worker.events if isinstance(one, ExecutorError)] == [error]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("num_machines: 2", "num_machines: an executor runs on one machine"),
        ("num_processes: 0", "num_processes: set it to the number of devices"),
        ("distributed_type: DEEPSPEED", "distributed_type: it must be one of NO, MULTI_CPU, MULTI_GPU, FSDP"),
        ("no: such key", "accelerate cannot read it"),
    ],
)
def test_what_accelerates_file_cannot_mean_names_file_and_key(
    tmp_path: Path, changed: str, said: str
) -> None:
    path = configuration(tmp_path, "MULTI_CPU")
    path.write_text(re.sub(rf"^{changed.partition(':')[0]}:.*\n", "", path.read_text(), flags=re.M) + changed)
    with pytest.raises(ConfigError, match=re.escape(said)) as failed:
        launch_arguments(path, "bridge.sock")
    assert str(path) in str(failed.value)


def test_cores_of_a_lease_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    args = launch_arguments(configuration(tmp_path, "MULTI_CPU"), "bridge.sock")
    assert args.num_cpu_threads_per_process == 2
    # one that is free: there may be other executors on this machine
    assert args.main_process_port == 0


def test_what_of_sharding_is_not_supported_is_refused() -> None:
    model, cpu = torch.nn.Linear(2, 2), torch.device("cpu")
    with pytest.raises(ModelError, match="fsdp_offload_params"):
        shard(model, cpu, 2, {"FSDP_OFFLOAD_PARAMS": "true"})
