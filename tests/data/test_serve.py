from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
import trio
from tests.data.reading import write_slices
from tests.support.network import Network, address_of
from tests.support.polling import until
from tests.support.signals import Signals

from hypha.config.models import DataConfig, DatasetConfig
from hypha.data import Dataset, PrepareOptions, load_dataset_directory, prepare, read_manifest, run_data
from hypha.data.preparing.staging import Staging
from hypha.data.serving import serve
from hypha.data.serving.serve import Shelf, load_datasets
from hypha.data.serving.served import ServedSlices
from hypha.errors import ConfigError, DataError, InputUnusable, PeerUnreachable, Refused
from hypha.files.disks import lock
from hypha.messages import (
    DatasetDescription,
    DescribeDataset,
    FileList,
    Health,
    HealthReport,
    ListFiles,
    PeerRef,
    PullFile,
    TransferMeta,
)
from hypha.net import Libp2pNode as Node
from hypha.telemetry import instruments as metrics
from hypha.tracing import span
from hypha.tracing.operations import FETCH_SLICE

ORGANIZATIONS = {"worker": "Lab", "any": "Other Lab"}


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return load_dataset_directory(write_slices(tmp_path / "set"))


def shelf_of(*datasets: Dataset) -> Shelf:
    return Shelf(list(datasets), ORGANIZATIONS.__getitem__)


async def pull(shelf: Shelf, name: str, caller: str = "worker") -> tuple[Path, TransferMeta]:
    return await shelf.provide(caller, PullFile(kind="slice", name=name))


def flip(path: Path) -> None:
    """Another last byte; same size."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


async def test_a_dataset_that_was_replaced_under_the_node_is_told_as_such(
    dataset: Dataset, tmp_path: Path
) -> None:
    shelf = shelf_of(dataset)
    await pull(shelf, "set/0")
    write_slices(tmp_path / "new", seed=1)
    load_dataset_directory(tmp_path / "new", "set")
    dataset.directory.rename(tmp_path / "old")
    (tmp_path / "new").rename(dataset.directory)
    with pytest.raises(Refused, match="another dataset was put in its place; start the data node again"):
        await pull(shelf, "set/0")


# --- what is answered -------------------------------------------------------------------------------


async def test_slices_are_found_by_number(dataset: Dataset) -> None:
    shelf = shelf_of(dataset)
    for index, part in enumerate(dataset.manifest.slices):
        path, meta = await pull(shelf, f"set/{index}", caller="any")
        assert path == dataset.directory / part.file
        assert meta == TransferMeta(
            kind="slice", name=f"set/{index}", size=part.size, blake3=part.blake3, samples=4
        )
    files = await shelf.list_files("worker", ListFiles(kind="slice", name="set"))
    assert files.files[2] == (await pull(shelf, "set/2"))[1]


@pytest.mark.parametrize(
    "name",
    ["set/3", "set/-1", "set/", "set", "", "/0", "set/0/0", "set/1_0", "set/ 1", "set/٢", "set/x", "other/0"],
)
async def test_what_is_not_there_is_refused(dataset: Dataset, name: str) -> None:
    with pytest.raises(Refused) as caught:
        await pull(shelf_of(dataset), name)
    assert caught.value.code == "not-found"


async def test_a_very_long_number_is_refused(dataset: Dataset) -> None:
    with pytest.raises(Refused, match="not-found"):
        await pull(shelf_of(dataset), "set/" + "9" * 5000)


async def test_a_dataset_name_may_hold_slashes(tmp_path: Path) -> None:
    dataset = load_dataset_directory(write_slices(tmp_path / "set"), "team/digits")
    assert (await pull(shelf_of(dataset), "team/digits/1"))[1].name == "team/digits/1"


async def test_unknown_datasets_and_kinds_are_refused(dataset: Dataset) -> None:
    shelf = shelf_of(dataset)
    described = await shelf.describe("worker", DescribeDataset(dataset="set"))
    assert described.manifest_hash == dataset.manifest_hash
    for request in (ListFiles(kind="slice", name="other"), ListFiles(kind="model")):
        with pytest.raises(Refused, match="not-found"):
            await shelf.list_files("worker", request)
    with pytest.raises(Refused, match="not-found"):
        await shelf.describe("worker", DescribeDataset(dataset="other"))


async def test_a_dataset_may_be_for_some_organisations_only(dataset: Dataset) -> None:
    shelf = Shelf([dataset], ORGANIZATIONS.__getitem__, {"set": frozenset({"Lab"})})
    await shelf.describe("worker", DescribeDataset(dataset="set"))
    await shelf.list_files("worker", ListFiles(kind="slice", name="set"))
    await pull(shelf, "set/0", caller="worker")
    with pytest.raises(Refused, match=r"not-allowed.*'Other Lab'"):
        await shelf.describe("any", DescribeDataset(dataset="set"))
    with pytest.raises(Refused, match="not-allowed"):
        await shelf.list_files("any", ListFiles(kind="slice", name="set"))
    with pytest.raises(Refused, match="not-allowed"):
        await pull(shelf, "set/0", caller="any")


async def test_a_corrupt_slice_is_never_served_and_read_only_once(
    dataset: Dataset, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = count_reads(monkeypatch)
    flip(dataset.paths[1])
    shelf = shelf_of(dataset)
    for _ in range(3):
        with pytest.raises(Refused, match="set/1 is corrupt here") as caught:
            await pull(shelf, "set/1")
        assert caught.value.code == "invalid"
    assert reads == [dataset.paths[1]]
    (record,) = [one for one in caplog.records if one.levelno == logging.ERROR]
    assert "part-1.safetensors" in record.getMessage()
    assert shelf.health_details() == {"dataset set": "3 slices, 12 samples, 1 found corrupt"}
    await pull(shelf, "set/0")


async def test_a_slice_that_is_mended_is_served_again(dataset: Dataset) -> None:
    shelf = shelf_of(dataset)
    whole = dataset.paths[0].read_bytes()
    await pull(shelf, "set/0")
    flip(dataset.paths[0])
    with pytest.raises(Refused, match="invalid"):
        await pull(shelf, "set/0")
    dataset.paths[0].unlink()
    with pytest.raises(Refused, match="missing"):
        await pull(shelf, "set/0")
    dataset.paths[0].write_bytes(whole)
    await pull(shelf, "set/0")


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Which files were read through; the reading itself stays."""
    reads: list[Path] = []
    slice_problem = serve.slice_problem

    def counted(path: Path, *rest: object) -> str | None:
        reads.append(path)
        return slice_problem(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(serve, "slice_problem", counted)
    return reads


async def test_many_who_want_one_slice_wait_for_one_reading(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = count_reads(monkeypatch)
    shelf = shelf_of(dataset)
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(pull, shelf, "set/2")
    assert reads == [dataset.paths[2]]


# --- start-up ---------------------------------------------------------------------------------------


def config(network: Network, gateways: Iterable[Node | str], *paths: Path, **changes: object) -> DataConfig:
    files = network.pki.files("data", roles=("data",))
    return DataConfig(
        cert_pem=files.cert,
        key_pem=files.key,
        trust_pem=files.trust,
        gateway_addresses=[one if isinstance(one, str) else address_of(one) for one in gateways],
        listen_addresses=["/ip4/127.0.0.1/tcp/0"],
        exclude_cidr=[],
        datasets=[DatasetConfig(path=path) for path in paths],
        **changes,
    )


NOWHERE = "/ip4/127.0.0.1/tcp/1"


async def test_all_problems_of_all_datasets_are_told_at_once(network: Network, tmp_path: Path) -> None:
    cut = write_slices(tmp_path / "cut")
    load_dataset_directory(cut)
    (cut / "part-0.safetensors").write_bytes(b"x")
    (cut / "part-1.safetensors").unlink()
    whole = write_slices(tmp_path / "whole")
    (tmp_path / "empty").mkdir()
    twice = write_slices(tmp_path / "again" / "whole")
    with pytest.raises(ConfigError) as caught:
        await run_data(config(network, [NOWHERE], cut, whole, tmp_path / "empty", twice))
    told = str(caught.value)
    assert {problem.key for problem in caught.value.problems} == {"datasets[0]", "datasets[2]", "datasets[3]"}
    for said in ("part-0.safetensors has 1 bytes", "part-1.safetensors cannot be read", "empty holds no"):
        assert said in told
    assert "two datasets are called 'whole'" in told


async def test_verifying_at_start_finds_what_sizes_do_not_show(network: Network, dataset: Dataset) -> None:
    flip(dataset.paths[2])
    assert len(await load_datasets(config(network, [NOWHERE], dataset.directory))) == 1
    with pytest.raises(ConfigError, match=r"part-2\.safetensors.*BLAKE3"):
        await load_datasets(config(network, [NOWHERE], dataset.directory, verify_at_start=True))


async def test_dataset_path_is_short_for_one_dataset(network: Network, dataset: Dataset) -> None:
    (loaded,) = await load_datasets(config(network, [NOWHERE], dataset_path=dataset.directory))
    assert loaded == dataset
    with pytest.raises(ConfigError, match="no dataset to serve"):
        await load_datasets(config(network, [NOWHERE]))


async def test_a_dataset_is_locked_before_it_is_read(
    network: Network, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reading(directory: Path, *_: object) -> Dataset:
        with pytest.raises(InputUnusable, match="set is being served by a data node"):
            Staging(directory, force=True)
        raise DataError("it was locked")

    monkeypatch.setattr(serve, "load_dataset_directory", reading)
    with pytest.raises(ConfigError, match="it was locked"):
        await run_data(config(network, [NOWHERE], dataset.directory))
    # and no longer than needed
    with Staging(dataset.directory, force=True):
        pass


async def test_a_dataset_that_stays_locked_is_a_problem_like_any_other(
    network: Network, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "LOCK_TIMEOUT_S", 0.1)
    replacing = lock(dataset.directory, fcntl.LOCK_EX)
    assert replacing is not None
    with trio.fail_after(20), pytest.raises(ConfigError) as caught:
        await run_data(config(network, [NOWHERE], dataset.directory, tmp_path / "absent"))
    os.close(replacing)
    locked, absent = caught.value.problems
    assert (locked.key, absent.key) == ("datasets[0]", "datasets[1]")
    assert "set is locked by another process" in locked.message
    assert "start this data node again" in locked.message
    assert "absent is no directory" in absent.message


@pytest.mark.loopback
async def test_a_dataset_that_is_just_being_replaced_is_waited_for(
    network: Network, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    load_dataset_directory(write_slices(tmp_path / "new", count=1, seed=1), "set")
    replacing = lock(dataset.directory, fcntl.LOCK_EX)
    assert replacing is not None
    started = trio.Event()

    async def start() -> None:
        await nursery.start(run_data, config(network, [NOWHERE], dataset.directory))
        started.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(start)
        await until(lambda: started.is_set() or "Waiting for" in caplog.text)
        assert not started.is_set()
        dataset.directory.rename(tmp_path / "old")
        (tmp_path / "new").rename(dataset.directory)
        os.close(replacing)
        with trio.fail_after(20):
            await started.wait()
        # the new one is locked, not the old one
        assert lock(dataset.directory, fcntl.LOCK_EX) is None
        free = lock(tmp_path / "old", fcntl.LOCK_EX)
        assert free is not None
        os.close(free)
        nursery.cancel_scope.cancel()


async def test_where_there_are_no_locks_it_is_served_with_a_warning(
    network: Network, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_here(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none_here)
    with contextlib.ExitStack() as locks:
        assert await load_datasets(config(network, [NOWHERE], dataset.directory), locks) == [dataset]
    assert "cannot be locked (No locks available): do not prepare another dataset there" in caplog.text


# --- over the network -------------------------------------------------------------------------------


async def providers(node: Node, name: str, count: int) -> list[PeerRef]:
    """Wait until ``count`` data nodes are known to serve ``name``."""
    with trio.fail_after(20):
        while True:
            if len(found := await node.find_providers(name)) == count:
                return found
            await trio.sleep(0.05)


@pytest.mark.loopback
async def test_nothing_is_prepared_over_what_a_node_serves(network: Network, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("x\n1\n2\n")
    options = PrepareOptions(sources=(tmp_path / "in.csv",), output=tmp_path / "digits", force=True)
    first = await trio.to_thread.run_sync(prepare, options)
    async with network.gateway() as gateway, trio.open_nursery() as nursery:
        await nursery.start(run_data, config(network, [gateway], tmp_path / "digits"))
        with pytest.raises(InputUnusable, match="digits is being served by a data node"):
            await trio.to_thread.run_sync(prepare, options)
        nursery.cancel_scope.cancel()
    again = await trio.to_thread.run_sync(prepare, options)
    assert again.manifest_hash == first.manifest_hash


@pytest.mark.loopback
async def test_two_data_nodes_serve_one_dataset(network: Network, tmp_path: Path) -> None:
    first, second = write_slices(tmp_path / "a" / "digits"), write_slices(tmp_path / "b" / "digits")
    other = write_slices(tmp_path / "b" / "other", count=1, seed=9)
    load_dataset_directory(second)
    flip(second / "part-1.safetensors")
    async with network.gateway() as gateway, trio.open_nursery() as nursery:
        one: PeerRef = await nursery.start(run_data, config(network, [gateway], first))
        two: PeerRef = await nursery.start(run_data, config(network, [gateway], second, other))
        async with network.leaf("worker", [gateway], roles=("worker",)) as worker:
            found = await providers(worker, "digits", 2)
            assert {ref.peer for ref in found} == {one.peer, two.peer}
            assert [ref.peer for ref in await providers(worker, "other", 1)] == [two.peer]
            answers = [await worker.request(ref, DescribeDataset(dataset="digits")) for ref in found]
            assert isinstance(answers[0], DatasetDescription)
            assert isinstance(answers[1], DatasetDescription)
            assert answers[0].manifest_hash == answers[1].manifest_hash
            manifest = answers[0].manifest
            for index in range(3):
                meta = await fetch(worker, one, f"digits/{index}", tmp_path / f"slice-{index}")
                assert meta.size == manifest.slices[index].size
                whole = first / manifest.slices[index].file
                assert (tmp_path / f"slice-{index}").read_bytes() == whole.read_bytes()
            for name, code in (
                ("digits/3", "not-found"),
                ("nothing/0", "not-found"),
                ("digits/1", "invalid"),
            ):
                with pytest.raises(Refused) as caught:
                    await fetch(worker, two, name, tmp_path / "refused")
                assert caught.value.code == code
                assert not (tmp_path / "refused").exists()
            await fetch(worker, two, "digits/2", tmp_path / "after")
            files = await worker.request(two, ListFiles(kind="slice", name="other"))
            assert isinstance(files, FileList)
            assert [one.name for one in files.files] == ["other/0"]
            health = await worker.request(two, Health())
            assert isinstance(health, HealthReport)
            assert health.component == "hypha-data"
            assert "1 found corrupt" in health.details["dataset digits"]
        nursery.cancel_scope.cancel()


async def fetch(node: Node, peer: PeerRef, name: str, destination: Path) -> TransferMeta:
    with trio.fail_after(20):
        return await node.transfers.pull(
            peer, PullFile(kind="slice", name=name), destination, expect=None, max_bytes=1 << 20
        )


@pytest.mark.loopback
async def test_another_role_is_told_no(network: Network, dataset: Dataset, tmp_path: Path) -> None:
    async with network.gateway() as gateway, trio.open_nursery() as nursery:
        data: PeerRef = await nursery.start(run_data, config(network, [gateway], dataset.directory))
        async with network.leaf("other", [gateway], roles=("data",)) as leaf:
            for request in (DescribeDataset(dataset="set"), ListFiles(kind="slice", name="set")):
                with pytest.raises(Refused, match="role"):
                    await leaf.request(data, request)
            with pytest.raises(Refused, match="role"):
                await fetch(leaf, data, "set/0", tmp_path / "none")
        nursery.cancel_scope.cancel()


@pytest.mark.loopback
async def test_a_data_node_starts_before_its_gateway_and_survives_its_loss(
    network: Network, dataset: Dataset, tmp_path: Path
) -> None:
    identity = network.pki.identity("gateway", roles=("gateway",))
    with trio.socket.socket() as probe:
        await probe.bind(("127.0.0.1", 0))
        address = f"/ip4/127.0.0.1/tcp/{probe.getsockname()[1]}"
    async with trio.open_nursery() as nursery:
        settings = config(network, [address], dataset.directory)
        data: PeerRef = await nursery.start(run_data, settings)
        for life in range(2):
            async with network.gateway(identity=identity, listen=(address,)) as gateway:
                async with network.leaf("worker", [gateway], roles=("worker",)) as worker:
                    assert [ref.peer for ref in await providers(worker, "set", 1)] == [data.peer]
                    await fetch(worker, data, "set/0", tmp_path / f"slice-{life}")
        nursery.cancel_scope.cancel()


@pytest.mark.loopback
async def test_local_http_tells_the_health(network: Network, dataset: Dataset) -> None:
    import httpx

    with trio.socket.socket() as probe:
        await probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with network.gateway() as gateway, trio.open_nursery() as nursery:
        settings = config(network, [gateway], dataset.directory, http_address=f"127.0.0.1:{port}")
        data: PeerRef = await nursery.start(run_data, settings)
        async with httpx.AsyncClient() as client:
            answer = await client.get(f"http://127.0.0.1:{port}/health")
        assert answer.json()["peer"] == data.peer
        assert answer.json()["component"] == "hypha-data"
        assert "samples" in answer.json()["details"]["dataset set"]
        nursery.cancel_scope.cancel()


def test_the_manifest_served_is_the_one_on_disk(dataset: Dataset) -> None:
    assert read_manifest(dataset.directory) == dataset.manifest


async def test_what_is_served_is_counted_by_dataset_and_is_a_span(dataset: Dataset, signals: Signals) -> None:
    served = ServedSlices(shelf_of(dataset).provide, frozenset({"set"}))
    asked = [PullFile(kind="slice", name=f"set/{index}", token=f"token {index}") for index in range(2)]
    with span(FETCH_SLICE) as fetching:
        for one in asked:
            await served.provide("worker", one)
        with pytest.raises(Refused):
            await served.provide("worker", PullFile(kind="slice", name="other/0", token="x"))
        with pytest.raises(Refused):
            await served.provide("worker", PullFile(kind="slice", name="set/99", token="y"))
    assert served.active == 2
    served.served("worker", asked[0], None)
    served.served("worker", asked[1], PeerUnreachable("worker", "it is gone"))
    served.served("worker", asked[1], None)
    assert served.active == 0
    requests = {
        (dict(labels)["dataset"], dict(labels)["status"]): count
        for labels, count in signals.readings(metrics.SLICE_REQUESTS).items()
    }
    assert requests == {("set", "success"): 1, ("set", "failure"): 2, ("other", "failure"): 1}
    assert signals.reading(metrics.SERVED_BYTES, dataset="set") == dataset.manifest.slices[0].size
    assert signals.reading(metrics.SERVE_DURATION, dataset="set") == 1
    spans = signals.spans("Serve slice")
    assert [one.parent == fetching.get_span_context() for one in spans] == [True] * 4
    assert [one.status.is_ok for one in spans] == [True, False, False, False]
    assert (spans[0].attributes or {})["hypha.slice"] == 0


async def test_a_slice_that_was_pulled_over_the_network_was_served(
    network: Network, dataset: Dataset, tmp_path: Path, signals: Signals
) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("data", [gateway], roles=("data",)) as node,
        network.leaf("worker", [gateway], roles=("worker",)) as worker,
        trio.open_nursery() as nursery,
    ):
        made = config(network, [gateway], dataset.directory)
        await nursery.start(serve.serve, made, [dataset], node)
        part = dataset.manifest.slices[1]
        await worker.transfers.pull(
            node.ref(), PullFile(kind="slice", name="set/1"), tmp_path / "slice", None, 10**6
        )
        await until(lambda: signals.reading(metrics.SERVE_DURATION, dataset="set") == 1)
        assert signals.reading(metrics.SERVED_BYTES, dataset="set") == part.size
        assert signals.reading(metrics.STREAMS) == 0
        nursery.cancel_scope.cancel()
