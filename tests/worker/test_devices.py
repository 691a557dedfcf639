"""GPUs of leases: one where one has the room, several for more than any has, each executor sees its own."""

from __future__ import annotations

import random

import pytest

from hypha.worker.limits.gpus import (
    MEMORY_VARIABLE,
    Gpu,
    GpuBoard,
    GpuShare,
    gpu_environment,
    memory_of_each,
    sees_no_gpu,
)

A = Gpu("nvidia", "0", "A", 24 * 10**9, "here", "GPU-a")
B = Gpu("nvidia", "1", "B", 24 * 10**9, "here", "GPU-b")


def test_jobs_get_gpus_of_their_own_first_and_share_later() -> None:
    board = GpuBoard((24.0, 24.0))
    for lease in ("a", "b", "c"):
        assert board.fits(10.0)
        board.place(lease, 10.0)
    assert [board.share_of(lease).numbers for lease in ("a", "b", "c")] == [(0,), (1,), (0,)]
    assert board.share_of("c").gb == 10.0
    board.keep_only(["b"])
    board.place("d", 10.0)
    assert board.share_of("d").numbers == (0,)


def test_what_is_free_on_no_gpu_by_itself_does_not_fit() -> None:
    board = GpuBoard((24.0, 24.0))
    board.place("a", 16.0)
    board.place("b", 16.0)
    assert board.fits(8.0)
    assert not board.fits(9.0), "16 are free, 8 of each"
    assert board.largest(16.0) == 8.0


def test_more_than_any_has_is_taken_of_several_that_nobody_uses() -> None:
    board = GpuBoard((24.0, 24.0, 24.0))
    board.place("a", 1.0)
    assert board.largest(71.0) == 48.0
    assert not board.fits(49.0)
    board.place("b", 40.0)
    assert board.share_of("b") == GpuShare((1, 2), 20.0)
    assert board.largest(31.0) == 23.0


def test_unequal_ones_are_taken_whole() -> None:
    board = GpuBoard((24.0, 8.0))
    board.place("a", 32.0)
    assert board.share_of("a") == GpuShare((0, 1), 8.0)


def test_the_tightest_fit_is_taken() -> None:
    board = GpuBoard((80.0, 24.0))
    board.place("a", 20.0)
    assert board.share_of("a").numbers == (1,)


def test_without_gpus_and_without_a_wish_everything_fits() -> None:
    assert GpuBoard(()).fits(5.0)
    assert GpuBoard(()).largest(5.0) == 5.0
    board = GpuBoard((24.0,))
    board.place("a", 24.0)
    assert board.fits(0.0)
    board.place("b", 0.0)
    assert board.share_of("b").numbers == ()


@pytest.mark.parametrize("seed", range(20))
def test_no_gpu_is_ever_promised_twice(seed: int) -> None:
    chance = random.Random(seed)
    gpus = [float(chance.choice((8, 24, 80))) for _ in range(chance.randint(1, 6))]
    board, held = GpuBoard(gpus), dict[str, float]()
    for number in range(200):
        if held and chance.random() < 0.4:
            held.pop(chance.choice(sorted(held)))
            board.keep_only(held)
        free = sum(gpus) - sum(held.values())
        wanted = board.largest(free) if chance.random() < 0.2 else chance.uniform(0.1, max(gpus) * 1.5)
        if wanted <= 0 or not board.fits(wanted):
            continue
        held[str(number)] = wanted
        board.place(str(number), wanted)
        assert board.share_of(str(number)).numbers, "whoever fits gets a GPU"
        shares = [board.share_of(lease) for lease in held]
        for gpu, there in enumerate(gpus):
            assert sum(share.gb for share in shares if gpu in share.numbers) <= there + 1e-6


def test_memory_that_nobody_tells_is_what_the_configuration_offers() -> None:
    unknown = Gpu("nvidia", "1", "B", 0, "/proc")
    assert memory_of_each([A, unknown, unknown], 64.0) == (24.0, 20.0, 20.0)
    assert memory_of_each([A], 10.0) == (24.0,)
    assert memory_of_each([], 10.0) == ()


def test_an_executor_sees_its_own_and_is_told_what_it_may_use() -> None:
    assert gpu_environment((A, B), GpuShare((1,), 12.0), {}, capped=True) == {
        "CUDA_VISIBLE_DEVICES": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        MEMORY_VARIABLE: "12000000000",
    }
    both = gpu_environment((A, B), GpuShare((0, 1), 24.0), {}, capped=False)
    assert both["CUDA_VISIBLE_DEVICES"] == "0,1"
    none = gpu_environment((A, B), GpuShare(), {}, capped=True)
    assert none == {"CUDA_VISIBLE_DEVICES": ""}
    assert sees_no_gpu(none)
    assert gpu_environment((), GpuShare(), {"CUDA_VISIBLE_DEVICES": "3"}, capped=True) == {
        "CUDA_VISIBLE_DEVICES": "3"
    }
    assert not sees_no_gpu({})


def test_rocms_second_filter_is_not_inherited() -> None:
    amd = Gpu("amd", "0", "MI300", 192 * 10**9, "here")
    inherited = {"HIP_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "0,1", "ROCR_VISIBLE_DEVICES": "0,1"}
    share = GpuShare((0,), 100.0)
    assert gpu_environment((amd,), share, inherited, capped=False) == {"ROCR_VISIBLE_DEVICES": "0"}
    found = gpu_environment((A,), GpuShare(), inherited, capped=False)
    assert found == {"HIP_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": ""}, "the worker's own names more"
