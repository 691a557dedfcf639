"""The outer step: the numbers of torch's SGD, the right weights, and no poisoned sum."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
import torch

from hypha.errors import Refused
from hypha.executor.files import tensors, updates
from hypha.executor.files.theta import Theta
from hypha.executor.outer.admission import MOST_ASIDE
from hypha.executor.outer.step import OuterStep
from hypha.messages import (
    AggregateJob,
    ExecutorDescriptor,
    LedgerRound,
    ModelSpec,
    OuterOptimizer,
    PeerRef,
)

NUMERICS = Path(__file__).with_name("nesterov.json")


def job(**changes: object) -> AggregateJob:
    values: dict[str, object] = {
        "job_id": "job",
        "generation": 0,
        "executor": ExecutorDescriptor(kind="aggregate", name="parameter-server"),
        "me": "server",
        "scheduler": PeerRef(peer="scheduler"),
        "model": ModelSpec(task="torch"),
    }
    return AggregateJob(**(values | changes))  # type: ignore[arg-type]


def theta_with(values: list[float], **buffers: torch.Tensor) -> Theta:
    return Theta({"w": torch.tensor(values)}, buffers)


@pytest.fixture
def update(tmp_path: Path) -> object:
    count = 0

    def write(base: Theta, delta: list[float] | torch.Tensor, **buffers: torch.Tensor) -> Path:
        nonlocal count
        count += 1
        path = tmp_path / f"update-{count}"
        local = Theta({"w": base.parameters["w"] + torch.as_tensor(delta)}, buffers)
        tensors.write(path, {"w": local.parameters["w"] - base.parameters["w"]} | local.buffers)
        return path

    return write


def test_three_steps_are_those_of_the_fixture_and_of_torch(update: object) -> None:
    pinned = json.loads(NUMERICS.read_text())
    theta = theta_with(pinned["theta"])
    outer = OuterStep(theta, job(optimizer=OuterOptimizer(learning_rate=pinned["lr"], momentum=pinned["mu"])))
    parameter = torch.nn.Parameter(torch.tensor(pinned["theta"]))
    sgd = torch.optim.SGD([parameter], lr=pinned["lr"], momentum=pinned["mu"], nesterov=True)
    for step in pinned["steps"]:
        for worker, (samples, delta) in step["updates"].items():
            outer.add(worker, samples, update(theta, delta))  # type: ignore[operator]
        total = sum(samples for samples, _ in step["updates"].values())
        mean = sum(torch.tensor(delta) * samples / total for samples, delta in step["updates"].values())
        norm = outer.apply()
        parameter.grad = -torch.as_tensor(mean)
        sgd.step()
        assert norm == pytest.approx(float(torch.as_tensor(mean).norm()), rel=1e-5)
        torch.testing.assert_close(theta.parameters["w"], parameter.detach(), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(theta.parameters["w"], torch.tensor(step["theta"]), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(outer.momentum["w"], torch.tensor(step["momentum"]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_the_mean_is_weighted_by_samples_whatever_the_order(update: object, workers: int) -> None:
    generator = torch.Generator().manual_seed(workers)
    deltas = [torch.randn(4, generator=generator).tolist() for _ in range(workers)]
    samples = [7 * (index + 1) for index in range(workers)]
    wanted = sum(w * torch.tensor(d) for w, d in zip(samples, deltas, strict=True)) / sum(samples)
    for order in (range(workers), reversed(range(workers))):
        theta = theta_with([0.0] * 4)
        outer = OuterStep(theta, job(optimizer=OuterOptimizer(learning_rate=1.0, momentum=0.0)))
        for index in order:
            outer.add(str(index), samples[index], update(theta, deltas[index]))  # type: ignore[operator]
        outer.apply()
        torch.testing.assert_close(theta.parameters["w"], wanted, atol=1e-6, rtol=1e-5)


def test_uniform_weighting_counts_workers(update: object) -> None:
    theta = theta_with([0.0])
    plain = OuterOptimizer(learning_rate=1.0, momentum=0.0)
    outer = OuterStep(theta, job(optimizer=plain, weighting="uniform"))
    outer.add("a", 1, update(theta, [1.0]))  # type: ignore[operator]
    outer.add("b", 99, update(theta, [3.0]))  # type: ignore[operator]
    outer.apply()
    assert theta.parameters["w"].tolist() == [2.0]


def test_buffers_are_averaged_and_counters_take_the_maximum(update: object) -> None:
    theta = theta_with([0.0], var=torch.ones(2), count=torch.tensor(5), seen=torch.tensor([False, False]))
    outer = OuterStep(theta, job(optimizer=OuterOptimizer(learning_rate=0.7, momentum=0.9)))
    for step in range(3):
        one = update(  # type: ignore[operator]
            theta,
            [1.0],
            var=torch.tensor([0.1, 2.0]),
            count=torch.tensor(9 + step),
            seen=torch.tensor([True, False]),
        )
        two = update(  # type: ignore[operator]
            theta,
            [1.0],
            var=torch.tensor([0.4, 8.0]),
            count=torch.tensor(7 + step),
            seen=torch.tensor([False, False]),
        )
        outer.add("a", 1, one)
        outer.add("b", 2, two)
        outer.apply()
        # a mean of positive variances, without momentum, can never turn negative
        torch.testing.assert_close(theta.buffers["var"], torch.tensor([0.3, 6.0]))
        assert theta.buffers["count"] == 9 + step
        assert theta.buffers["seen"].tolist() == [True, False]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_poisoned_update_is_refused_before_anything_is_added(update: object, bad: float) -> None:
    theta = theta_with([0.0, 0.0, 0.0])
    outer = OuterStep(theta, job(optimizer=OuterOptimizer(learning_rate=1.0, momentum=0.0)))
    outer.add("good", 1, update(theta, [1.0, 2.0, 3.0]))  # type: ignore[operator]
    with pytest.raises(Refused, match="not finite") as refused:
        outer.add("bad", 1, update(theta, [1.0, bad, 1.0]))  # type: ignore[operator]
    assert refused.value.code == "invalid"
    outer.apply()
    assert theta.parameters["w"].tolist() == [1.0, 2.0, 3.0]


def test_a_poisoned_buffer_is_refused(update: object) -> None:
    theta = theta_with([0.0], var=torch.ones(1))
    outer = OuterStep(theta, job())
    with pytest.raises(Refused, match="buffer var"):
        outer.add("bad", 1, update(theta, [1.0], var=torch.tensor([float("nan")])))  # type: ignore[operator]
    assert outer.contributors == {}


def test_duplicates_and_updates_of_nothing_are_refused(update: object) -> None:
    theta = theta_with([0.0])
    outer = OuterStep(theta, job(optimizer=OuterOptimizer(learning_rate=1.0, momentum=0.0)))
    outer.add("a", 1, update(theta, [1.0]))  # type: ignore[operator]
    with pytest.raises(Refused) as refused:
        outer.add("a", 1, update(theta, [5.0]))  # type: ignore[operator]
    assert refused.value.code == "duplicate"
    for samples in (0, -3):
        with pytest.raises(Refused) as refused:
            outer.add("b", samples, update(theta, [5.0]))  # type: ignore[operator]
        assert refused.value.code == "invalid"
    outer.apply()
    assert theta.parameters["w"].tolist() == [1.0]
    outer.add("a", 1, update(theta, [1.0]))  # type: ignore[operator]  # a new round, not a duplicate


def test_shapes_names_and_dtypes_must_be_those_of_theta(tmp_path: Path) -> None:
    outer = OuterStep(theta_with([0.0, 0.0]), job())
    for values in (
        {"w": torch.zeros(3)},
        {"v": torch.zeros(2)},
        {"w": torch.zeros(2, dtype=torch.float64)},
        {"w": torch.zeros(2), "more": torch.zeros(1)},
    ):
        tensors.write(tmp_path / "u", values)
        with pytest.raises(Refused) as refused:
            outer.add("a", 1, tmp_path / "u")
        assert refused.value.code == "invalid"
    (tmp_path / "u").write_bytes(b"nonsense")
    with pytest.raises(Refused, match="no valid safetensors"):
        outer.add("a", 1, tmp_path / "u")


def test_large_updates_are_clipped_to_the_norm(update: object) -> None:
    theta = theta_with([0.0, 0.0])
    plain = OuterOptimizer(learning_rate=1.0, momentum=0.0)
    outer = OuterStep(theta, job(optimizer=plain, max_update_norm=1.0))
    outer.add("huge", 1, update(theta, [300.0, 400.0]))  # type: ignore[operator]
    outer.add("small", 1, update(theta, [0.3, 0.4]))  # type: ignore[operator]
    outer.apply()
    torch.testing.assert_close(theta.parameters["w"], torch.tensor([0.45, 0.6]))


def robust() -> OuterStep:
    """A plain mean, with the default of jobs."""
    plain = OuterOptimizer(learning_rate=1.0, momentum=0.0)
    return OuterStep(theta_with([0.0, 0.0]), job(optimizer=plain, max_update_ratio=10.0))


@pytest.mark.parametrize("place", range(4))
def test_a_huge_update_moves_theta_as_far_as_another_from_the_first_round_on(
    update: object, caplog: pytest.LogCaptureFixture, place: int
) -> None:
    outer, theta = (made := robust()), made.theta
    for round_ in range(3):
        before = theta.copy().parameters["w"]
        honest = [[1.0, 0.0], [1.1, 0.0], [0.9, 0.0]]
        deltas = [*honest[:place], [0.0, 1e15], *honest[place:]]
        for number, delta in enumerate(deltas):
            outer.add(f"w{number}", 5, update(theta, delta))  # type: ignore[operator]
        outer.apply()
        moved = theta.parameters["w"] - before
        # rounding of theta itself takes part in the update, as it is so large
        assert float(moved[0]) == pytest.approx(0.75, rel=1e-5), round_
        assert 0.2 <= float(moved[1]) <= 0.3, round_
        assert outer.statistics[place].clip == pytest.approx(1e-15, rel=0.2)
        assert [one.clip for one in outer.statistics if one.worker != f"w{place}"] == [1.0] * 3
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == 3
    assert all(text.startswith(f"The update of w{place} has a norm of 1e+15") for text in named)


def test_honest_updates_are_the_same_bits_with_and_without_the_limit(update: object) -> None:
    plain = OuterStep(theta_with([0.0, 0.0]), job())
    limited = OuterStep(theta_with([0.0, 0.0]), job(max_update_ratio=10.0))
    for round_ in range(3):
        for number in range(20):
            delta = [0.1 * number + round_, 0.3]
            for outer in (plain, limited):
                outer.add(f"w{number}", 1 + number, update(outer.theta, delta))  # type: ignore[operator]
        assert plain.apply() == limited.apply()
        assert torch.equal(plain.theta.parameters["w"], limited.theta.parameters["w"])


def test_a_first_round_keeps_few_updates_aside_and_leaves_no_file(update: object, tmp_path: Path) -> None:
    outer = robust()
    for number in range(MOST_ASIDE + 4):
        outer.add(f"w{number}", 1, update(outer.theta, [1.0, 0.0]))  # type: ignore[operator]
        aside = len(list(tmp_path.glob("*.aside")))
        assert aside == (number + 1 if number + 1 < MOST_ASIDE else 0)
    outer.apply()
    torch.testing.assert_close(outer.theta.parameters["w"], torch.tensor([1.0, 0.0]))
    outer.add("w", 1, update(outer.theta, [1.0, 0.0]))  # type: ignore[operator]
    assert not list(tmp_path.glob("*.aside")), "from then on the rounds before it are known"


def test_updates_of_nothing_do_not_make_everything_an_outlier(update: object) -> None:
    outer = robust()
    for worker in "abc":
        outer.add(worker, 1, update(outer.theta, [0.0, 0.0]))  # type: ignore[operator]
    outer.apply()
    for worker in "abc":
        outer.add(worker, 1, update(outer.theta, [3.0, 4.0]))  # type: ignore[operator]
    assert outer.apply() == pytest.approx(5.0)


def test_what_was_scaled_down_is_replayed_to_the_bit(update: object) -> None:
    outer, again = robust(), robust()
    for round_ in range(3):
        copies = []
        for number, delta in enumerate(([0.3, 0.1], [700.0, 1.0], [0.2, 0.2])):
            path = update(outer.theta, delta)  # type: ignore[operator]
            copies.append(path.with_name(f"{path.name}-copy"))
            copies[-1].write_bytes(path.read_bytes())
            outer.add(f"w{number}", 4, path)
        outer.apply()
        entry = LedgerRound(
            round=round_, theta="", contributors=(), generation=0, samples=12, updates=outer.statistics
        )
        read = msgspec.json.decode(msgspec.json.encode(entry), type=LedgerRound)
        recorded = {one.worker: one for one in read.updates}
        assert (recorded["w1"].clip or 0.0) < 0.01
        for number, copy in enumerate(copies):
            again.add(f"w{number}", 4, copy, recorded[f"w{number}"])
        again.apply()
        assert torch.equal(outer.theta.parameters["w"], again.theta.parameters["w"])


def test_a_round_without_updates_changes_nothing(update: object) -> None:
    theta = theta_with([0.0])
    outer = OuterStep(theta, job())
    outer.add("a", 1, update(theta, [1.0]))  # type: ignore[operator]
    outer.apply()
    before, momentum = theta.copy().parameters["w"], outer.momentum["w"].clone()
    assert outer.apply() == 0.0
    assert torch.equal(theta.parameters["w"], before)
    assert torch.equal(outer.momentum["w"], momentum)


def test_momentum_survives_a_checkpoint(update: object, tmp_path: Path) -> None:
    theta = theta_with([0.0, 1.0])
    outer = OuterStep(theta, job())
    outer.add("a", 1, update(theta, [1.0, 2.0]))  # type: ignore[operator]
    outer.apply()
    tensors.write(tmp_path / "m", outer.momentum_or_zeros())
    copy = theta.copy()
    momentum = {"w": torch.empty(2)}
    tensors.read(tmp_path / "m", momentum)
    restored = OuterStep(copy, job())
    restored.restore_momentum(momentum)
    for each in (outer, restored):
        each.add("a", 1, update(each.theta, [0.5, -1.0]))  # type: ignore[operator]
        each.apply()
    assert torch.equal(theta.parameters["w"], copy.parameters["w"])


def test_label_skewed_shards_are_weighted_by_their_samples(tmp_path: Path) -> None:
    """One step of plain gradient descent on two shards of one class each, of 10 and 90 samples: the weighted
    mean of their updates is the step on all samples; the unweighted one is not.
    """
    torch.manual_seed(0)
    shards = [
        (torch.randn(10, 3) + 2, torch.zeros(10).long()),
        (torch.randn(90, 3) - 2, torch.ones(90).long()),
    ]

    def step(weights: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        leaf = weights.clone().requires_grad_()
        torch.nn.functional.cross_entropy(x @ leaf, y).backward()
        assert leaf.grad is not None
        return weights - leaf.grad

    start = torch.zeros(3, 2)
    together = step(start, torch.cat([x for x, _ in shards]), torch.cat([y for _, y in shards]))
    distances = {}
    for weighting in ("samples", "uniform"):
        theta = Theta({"w": start.clone()}, {})
        plain = OuterOptimizer(learning_rate=1.0, momentum=0.0)
        outer = OuterStep(theta, job(optimizer=plain, weighting=weighting))
        for index, (x, y) in enumerate(shards):
            local = Theta({"w": step(start, x, y)}, {})
            updates.write_update(tmp_path / "u", local, Theta({"w": start}, {}))
            outer.add(str(index), len(y), tmp_path / "u")
        outer.apply()
        distances[weighting] = float((theta.parameters["w"] - together).abs().max())
    assert distances["samples"] < 1e-6 < 0.01 < distances["uniform"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_number_of_workers(tmp_path: Path) -> None:
    theta = Theta({"large": torch.zeros(10_000_000), "small": torch.zeros(3)}, {})
    local = Theta({"large": torch.ones(10_000_000), "small": torch.ones(3)}, {})
    updates.write_update(tmp_path / "u", local, theta)
    del local
    outer = OuterStep(theta, job())
    outer.add("first", 1, tmp_path / "u")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = memory_kb("VmRSS")
    for worker in range(8):
        outer.add(str(worker), 1, tmp_path / "u")
    # one more update in memory would be 39,000
    assert memory_kb("VmHWM") - before < 12_000


def memory_kb(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name)))


# --- what is measured of updates -------------------------------------------------------------------------


def test_updates_are_measured_in_the_order_in_which_they_were_added(update: object) -> None:
    theta = theta_with([0.0, 0.0, 0.0])
    outer = OuterStep(theta, job(weighting="uniform"))
    outer.add("b", 4, update(theta, [3.0, 4.0, 0.0]))  # type: ignore[operator]
    outer.add("a", 4, update(theta, [-3.0, -4.0, 0.0]))  # type: ignore[operator]
    outer.add("c", 4, update(theta, [3.0, 4.0, 0.0]))  # type: ignore[operator]
    outer.apply()
    assert [(one.worker, one.norm) for one in outer.statistics] == [("b", 5.0), ("a", 5.0), ("c", 5.0)]
    assert [one.cosine for one in outer.statistics] == pytest.approx([1.0, -1.0, 1.0])
    assert all(one.size_bytes > 12 for one in outer.statistics)


def test_of_an_update_of_zeros_there_is_no_cosine(update: object) -> None:
    theta = theta_with([0.0, 0.0])
    outer = OuterStep(theta, job())
    outer.add("a", 1, update(theta, [0.0, 0.0]))  # type: ignore[operator]
    outer.add("b", 1, update(theta, [1.0, 0.0]))  # type: ignore[operator]
    outer.apply()
    assert [one.cosine for one in outer.statistics] == [None, 1.0]
    outer.apply()
    assert outer.statistics == ()


@pytest.mark.parametrize(("values", "threads"), [(1 << 18, 1), (20 << 18, 1), (20 << 18, 2)])
def test_the_cosine_is_that_to_the_mean_but_for_a_few_hundredths(
    update: object, values: int, threads: int
) -> None:
    """Also where only some of the chunks are looked at, and whichever thread looks."""
    chance = torch.Generator().manual_seed(7)
    shared = torch.randn(values, generator=chance)
    theta = Theta({"w": torch.zeros(values)}, {})
    outer = OuterStep(theta, job(), threads)
    vectors, weights = [], (1, 3, 2)
    for number, samples in enumerate(weights):
        vectors.append(shared * (1.0, 0.3, -0.2)[number] + torch.randn(values, generator=chance))
        outer.add(str(number), samples, update(theta, vectors[-1]))  # type: ignore[operator]
    outer.apply()
    mean = sum(one * weight for one, weight in zip(vectors, weights, strict=True))
    exact = [float(torch.nn.functional.cosine_similarity(one, mean, dim=0)) for one in vectors]
    assert [one.cosine for one in outer.statistics] == pytest.approx(exact, abs=0.06)
    assert [one.norm for one in outer.statistics] == pytest.approx(
        [float(one.double().norm()) for one in vectors]
    )


def moved_by(outer: OuterStep, update: object, moves: dict[str, dict[str, torch.Tensor]]) -> None:
    """A round in which each worker sends these buffers, beside a small update."""
    for worker, buffers in moves.items():
        outer.add(worker, 4, update(outer.theta, [0.1], **buffers))  # type: ignore[operator]


@pytest.mark.parametrize("huge", [1e6, 1e30, -1e30])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_worker_does_not_move_buffers_further_than_the_others(
    update: object, place: int, huge: float
) -> None:
    """In the first round and later on, whichever update comes first."""
    theta = theta_with([0.0], mean=torch.zeros(2), still=torch.ones(1), count=torch.tensor(0))
    outer = OuterStep(theta, job(max_update_ratio=10.0))
    for step in range(1, 3):
        moves = {
            f"w{number}": {
                "mean": torch.tensor([step + 0.1 * number, 0.0]),
                "still": torch.ones(1),
                "count": torch.tensor(10 * step + number),
            }
            for number in range(3)
        }
        moves[f"w{place}"] = {
            "mean": torch.tensor([huge, huge]),
            "still": torch.tensor([huge]),
            "count": torch.tensor(1 << 62),
        }
        moved_by(outer, update, moves)
        outer.apply()
        assert theta.buffers["mean"].abs().max() <= 2 * step
        # what most leave alone stays, bit by bit
        assert theta.buffers["still"].tolist() == [1.0]
        assert 0 < int(theta.buffers["count"]) <= 40 * step
        clips = {one.worker: one.buffer_clips for one in outer.statistics}
        assert set(clips.pop(f"w{place}") or {}) == {"mean", "still", "count"}
        assert clips == {worker: {} for worker in moves if worker != f"w{place}"}


def test_of_two_workers_earlier_rounds_say_what_is_usual(update: object) -> None:
    theta = theta_with([0.0], var=torch.ones(1))
    outer = OuterStep(theta, job(max_update_ratio=10.0))
    for step in range(3):
        moved_by(outer, update, {name: {"var": torch.tensor([1.5 + step])} for name in ("a", "b")})
        outer.apply()
    moved_by(outer, update, {"a": {"var": torch.tensor([1e20])}, "b": {"var": torch.tensor([4.0])}})
    outer.apply()
    assert float(theta.buffers["var"]) < 5.0


def test_flags_and_counters_may_be_moved_by_one_worker_alone(update: object) -> None:
    """That is what their maximum is for: which entries of a table were used, say."""
    theta = theta_with(
        [0.0], seen=torch.tensor([False, False, False]), used=torch.zeros(3, dtype=torch.int64)
    )
    outer = OuterStep(theta, job(max_update_ratio=10.0))
    moved_by(
        outer,
        update,
        {
            f"w{number}": {"seen": torch.arange(3) == number, "used": 3 * (torch.arange(3) == number)}
            for number in range(3)
        },
    )
    outer.apply()
    assert theta.buffers["seen"].all()
    assert theta.buffers["used"].tolist() == [3, 3, 3]


def test_a_replay_scales_buffers_as_the_ledger_says(update: object, tmp_path: Path) -> None:
    """Bit by bit, and as an entry of an earlier version, which says nothing of them, believed them."""

    def fresh() -> tuple[Theta, OuterStep]:
        theta = theta_with([0.0], mean=torch.zeros(3))
        return theta, OuterStep(theta, job(max_update_ratio=10.0))

    theta, outer = fresh()
    means = {"a": [0.3, 0.1, 0.7], "b": [1e7, 3.0, -2.0], "c": [0.2, 0.9, 0.4]}
    paths = {name: update(theta, [0.1], mean=torch.tensor(mean)) for name, mean in means.items()}  # type: ignore[operator]
    for number, (name, path) in enumerate(paths.items()):
        outer.add(name, 3 + number, Path(shutil.copy(path, tmp_path / f"live-{name}")))
    outer.apply()
    entry = LedgerRound(round=0, theta="", contributors=(), updates=outer.statistics)
    read = msgspec.json.decode(msgspec.json.encode(entry), type=LedgerRound)
    recorded = {one.worker: one for one in read.updates}
    for plain in (False, True):
        again, replayed = fresh()
        for number, (name, path) in enumerate(paths.items()):
            said = msgspec.structs.replace(recorded[name], **({"buffer_clips": None} if plain else {}))
            replayed.add(name, 3 + number, Path(shutil.copy(path, tmp_path / "again")), said)
        replayed.apply()
        assert torch.equal(again.buffers["mean"], theta.buffers["mean"]) is not plain
    assert not list(tmp_path.glob("*.buffers"))
