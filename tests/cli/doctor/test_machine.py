"""Faults of the machine: full disks, small limits, GPUs that torch cannot use, other versions."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from tests.cli.doctor.staging import among, only, worker_config
from tests.support.disks import small_disks
from tests.support.network import Pki

from hypha.cli.doctor import checks
from hypha.cli.doctor.gathered import Accelerators, Contact, Directory, MachineObservations
from hypha.cli.doctor.gathering import Gathering
from hypha.cli.doctor.gathering.machine import gather_machine, read_accelerators
from hypha.cli.doctor.judging.machine import judge_machine, judge_versions
from hypha.config.models import GatewayConfig, WorkerConfig
from hypha.config.tuning import SocketTuning
from hypha.worker.limits.detecting import DetectedMachine
from hypha.worker.limits.gpus import Gpu

DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"


@pytest.fixture
def worker(tmp_path: Path) -> WorkerConfig:
    return worker_config(Pki(tmp_path / "pki"), tmp_path)


async def test_nothing_is_found_on_this_machine(worker: WorkerConfig) -> None:
    gathering = Gathering()
    observed = await gather_machine(gathering, worker)
    assert gathering.unknown == []
    assert observed.directories[0].write_rate is not None
    assert (observed.receive_buffer or 0) > 4096
    assert {"hypha", "python", "libp2p"} <= observed.versions.keys()
    # how fast this machine's disk is while other tests use it is no matter of the doctor's
    quick = replace(observed.directories[0], write_rate=None)
    assert list(judge_machine(replace(observed, directories=(quick,)), worker)) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
async def test_a_disk_that_is_full(worker: WorkerConfig) -> None:
    with tempfile.TemporaryDirectory() as root, small_disks(Path(root), "disk", megabytes=8) as (disk,):
        disk.fill()
        full = worker.model_copy(update={"work_dir": disk.path / "work"})
        observed = await gather_machine(Gathering(), full)
        one = among(judge_machine(observed, full), checks.DISK_FULL)
    assert (one.severity, "has 0 MB left" in one.what) == ("error", True)


def test_a_disk_that_is_nearly_full(worker: WorkerConfig) -> None:
    observed = MachineObservations(directories=(Directory("work_dir", "/w", free_bytes=10**9),))
    assert only(judge_machine(observed, worker), checks.DISK_FULL).severity == "warning"


def test_a_disk_that_is_slow(worker: WorkerConfig) -> None:
    observed = MachineObservations(directories=(Directory("work_dir", "/w", 10**12, write_rate=2.5e6),))
    assert "2.5 MB a second" in only(judge_machine(observed, worker), checks.DISK_SLOW).what


async def test_a_directory_that_is_none(worker: WorkerConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    inside = worker.model_copy(update={"work_dir": tmp_path / "file" / "work"})
    observed = await gather_machine(Gathering(), inside)
    assert "is no directory" in among(judge_machine(observed, inside), checks.DIRECTORY).what


def test_fewer_files_than_connections(worker: WorkerConfig) -> None:
    gateway = GatewayConfig(
        **worker.model_dump(include={"cert_pem", "key_pem", "trust_pem"}),
        external_addresses=["/ip4/192.0.2.1/tcp/8080"],
    )
    observed = MachineObservations(open_files=1024)
    assert list(judge_machine(observed, worker)) == []
    one = only(judge_machine(observed, gateway), checks.FILE_DESCRIPTORS)
    assert "1024 files may be open (`ulimit -n`), and max_connections is 1024" in one.what
    assert only(judge_machine(MachineObservations(open_files=256), worker), checks.FILE_DESCRIPTORS)


def machine(memory: float, storage: float = 50.0) -> DetectedMachine:
    return DetectedMachine(1.0, "the machine", memory, "a cgroup", storage, "the file system")


def test_a_worker_that_offers_more_than_there_is(worker: WorkerConfig) -> None:
    observed = MachineObservations(has=machine(0.05))
    one = only(judge_machine(observed, worker), checks.RESOURCES_MISSING)
    assert "resources.memory is 0.1, more than this machine has (0.1 GB: a cgroup)" in one.what
    believed = worker.model_copy(update={"detect_resources": False})
    assert only(judge_machine(observed, believed), checks.RESOURCES_MISSING).what.endswith("and is offered")
    only(judge_machine(MachineObservations(has=machine(1.0, storage=0.01)), worker), checks.RESOURCES_MISSING)


async def test_buffers_that_the_kernel_does_not_give(worker: WorkerConfig) -> None:
    sockets = SocketTuning(receive_buffer_kb=1 << 20)
    tuned = worker.model_copy(update={"tuning": worker.tuning.model_copy(update={"sockets": sockets})})
    observed = await gather_machine(Gathering(), tuned)
    one = among(judge_machine(observed, tuned), checks.SOCKET_BUFFERS)
    assert "tuning.sockets.receive_buffer_kb asks for 1048576 KB" in one.what
    assert "sysctl -w net.core.rmem_max" in one.mend


# --- GPUs ------------------------------------------------------------------------------------------------


async def test_what_torch_says_of_this_machine(tmp_path: Path) -> None:
    """In a child process that imports it: the only test that takes the time."""
    (tmp_path / "version").write_text(DRIVER)
    found = await read_accelerators(tmp_path / "version")
    assert (found.problem, found.driver) == ("", "535.104.05")
    assert found.torch


async def test_a_torch_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: WorkerConfig
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudnn.so.9: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    observed = MachineObservations(accelerators=await read_accelerators(tmp_path / "none"))
    assert "libcudnn.so.9" in only(judge_machine(observed, worker), checks.TORCH_BROKEN).what


@pytest.mark.parametrize(
    ("found", "gpu", "severity", "words"),
    [
        (Accelerators("535.104.05", "2.13.0+cpu", "", 0), 8.0, "error", "is built for none"),
        (Accelerators("535.104.05", "2.13.0+cpu", "", 0), 0.0, "warning", "is built for none"),
        (Accelerators("580.95.05", "2.13.0", "13.0", 0), 8.0, "error", "finds none that it can use"),
        (Accelerators("", "2.13.0", "12.8", 0), 8.0, "error", "finds no GPU here"),
    ],
)
def test_a_gpu_that_torch_cannot_use(
    worker: WorkerConfig, found: Accelerators, gpu: float, severity: str, words: str
) -> None:
    offering = worker.model_copy(update={"resources": worker.resources.model_copy(update={"gpu": gpu})})
    one = only(judge_machine(MachineObservations(accelerators=found), offering), checks.GPU_UNUSABLE)
    assert (one.severity, words in one.what) == (severity, True)


def test_a_gpu_of_another_vendor_that_torch_cannot_use(worker: WorkerConfig) -> None:
    radeon = Gpu("amd", "0", "Radeon", 16 * 10**9, "the kernel")
    observed = MachineObservations(
        has=replace(machine(1.0), gpus=(radeon,)), accelerators=Accelerators("", "2.13.0", "12.8", 0)
    )
    one = only(judge_machine(observed, worker), checks.GPU_UNUSABLE)
    assert "has Radeon (16.0 GB), and torch 2.13.0 finds none that it can use" in one.what


def test_a_driver_that_is_older_than_what_torch_was_built_for(worker: WorkerConfig) -> None:
    observed = MachineObservations(accelerators=Accelerators("470.57.02", "2.13.0", "12.8", 0))
    one = only(judge_machine(observed, worker), checks.GPU_DRIVER)
    assert "needs driver 525.60, and this machine has 470.57.02" in one.what


def test_a_gpu_that_works_is_no_finding(worker: WorkerConfig) -> None:
    observed = MachineObservations(accelerators=Accelerators("580.95.05", "2.13.0", "13.0", 1))
    assert list(judge_machine(observed, worker)) == []


# --- versions --------------------------------------------------------------------------------------------


def test_versions_of_peers_that_differ() -> None:
    own = {"hypha": "0.2.1", "python": "3.11.2", "torch": "2.13.0+cpu", "numpy": "2.1.0"}
    same = Contact("a", packages={"hypha": "0.2.4", "python": "3.11.9", "torch": "2.13.0", "trio": "1"})
    assert list(judge_versions(own, (same, Contact("b")))) == []
    other = Contact("c", packages={**own, "torch": "2.12.1"})
    one = only(judge_versions(own, (same, other)), checks.VERSIONS_DIFFER)
    assert (one.severity, "torch 2.12.1 (here 2.13.0+cpu)" in one.what) == ("note", True)
    older = Contact("d", packages={**own, "hypha": "0.1.0"})
    assert only(judge_versions(own, (older,)), checks.VERSIONS_DIFFER).severity == "warning"
