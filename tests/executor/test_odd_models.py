"""Models whose tensors are odd: what is legal is trained and comes out right, what cannot travel is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.executor import small_job
from torch import Tensor

from hypha.errors import HyphaError, ModelError, NotFinite
from hypha.executor.files import tensors
from hypha.executor.files.theta import Theta, theta_of
from hypha.executor.models import loading as models
from hypha.executor.models.model_tensors import ModelTensors
from hypha.executor.outer.step import OuterStep
from hypha.messages import AggregateJob, ExecutorDescriptor, ModelSpec, PeerRef


def spec(name: str, **arguments: str) -> ModelSpec:
    return ModelSpec(task="torch", entrypoint=f"tests.executor.odd_models:{name}", arguments=dict(arguments))


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(16, 8, generator=generator),
            "labels": torch.randint(0, 3, (16,), generator=generator),
        }
        for _ in range(2)
    ]


def trained(path: Path, name: str) -> dict[str, Tensor]:
    path.mkdir()
    result = small_job.run(path, spec(name), None, rows())
    assert len(set(result.hashes)) == small_job.ROUNDS + 1, "each round has moved theta"
    return load_file(path / "output" / "model.safetensors")


def test_buffers_that_forward_sets_anew_are_those_that_it_changes_in_place(tmp_path: Path) -> None:
    anew, in_place = (
        trained(tmp_path / "anew", "RunningMean"),
        trained(tmp_path / "in_place", "RunningMeanInPlace"),
    )
    assert anew.keys() == in_place.keys()
    assert all(torch.equal(anew[name], in_place[name]) for name in anew)
    assert int(anew["count"]) == small_job.ROUNDS * small_job.BATCHES
    assert float(anew["mean"].abs().max()) > 0


def test_constant_buffers_stay_bit_by_bit_what_they_are(tmp_path: Path) -> None:
    exported = trained(tmp_path / "job", "Constants")
    before = theta_of(models.build(spec("Constants"), None)).buffers
    assert before.keys() == exported.keys() - {"net.weight", "net.bias"}
    assert "left" in before, "and right is the same tensor"
    for name, value in before.items():
        found = exported[name]
        assert found.dtype == value.dtype, name
        assert found.contiguous().numpy().tobytes() == value.contiguous().numpy().tobytes(), name


def test_parameters_of_any_layout_and_normalised_ones_are_trained(tmp_path: Path) -> None:
    exported = trained(tmp_path / "job", "ColumnMajor")
    fresh = theta_of(models.build(spec("ColumnMajor"), None)).parameters
    assert exported.keys() == fresh.keys()
    assert all(not torch.equal(exported[name], fresh[name]) for name in fresh)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("sparse", "buffer adjacency is sparse"),
        ("complex128", r"buffer turns is torch\.complex128"),
        ("lazy", r"parameter late\.weight has no values"),
        ("infinite", "parameter bias holds values that are not finite before training"),
        ("half", r"parameter scale is torch\.float16"),
        ("grows", r"state is F32\[5\] where the model has F32\[2\]"),
        ("changes type", r"state is F64\[2\] where the model has F32\[2\]"),
        ("goes away", "it lacks state"),
        ("appears", "it holds late"),
        ("two", "left and right were one tensor"),
        ("replaced", r"set the parameter net\.bias anew"),
    ],
)
def test_a_tensor_that_cannot_travel_is_named(tmp_path: Path, kind: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        small_job.run(tmp_path, spec("Unfit", kind=kind), None, rows())


def test_a_buffer_that_training_makes_infinite_is_a_divergence(tmp_path: Path) -> None:
    with pytest.raises(NotFinite, match="buffer state"):
        small_job.run(tmp_path, spec("Unfit", kind="diverges"), None, rows())


def test_state_that_is_no_tensor_is_not_lost_silently() -> None:
    with pytest.raises(ModelError, match="get_extra_state"):
        models.build(spec("Extra"), None)


def test_a_buffer_whose_values_overlap_is_given_its_own_memory() -> None:
    model = models.build(spec("RunningMean"), None)
    held = ModelTensors(model)
    model.mean = torch.ones(1).expand(8)
    live = held.theta().buffers["mean"]
    live.copy_(torch.arange(8.0))
    assert torch.equal(held.theta().buffers["mean"], torch.arange(8.0))


def server(theta: Theta) -> OuterStep:
    descriptor = ExecutorDescriptor(kind="aggregate", name="parameter-server")
    return OuterStep(
        theta,
        AggregateJob(
            job_id="job",
            generation=0,
            executor=descriptor,
            me="server",
            scheduler=PeerRef(peer="scheduler"),
            model=ModelSpec(task="torch"),
        ),
    )


def added(outer: OuterStep, path: Path, worker: str, samples: int, buffer: Tensor) -> None:
    tensors.write(path, {"w": torch.zeros(1), "b": buffer})
    outer.add(worker, samples, path)


def test_the_mean_of_half_precision_buffers_does_not_overflow(tmp_path: Path) -> None:
    theta = Theta({"w": torch.zeros(1)}, {"b": torch.zeros(2, dtype=torch.float16)})
    outer = server(theta)
    added(outer, tmp_path / "u", "a", 40_000, torch.full((2,), 4.0, dtype=torch.float16))
    added(outer, tmp_path / "u", "b", 40_000, torch.full((2,), 2.0, dtype=torch.float16))
    outer.apply()
    assert theta.buffers["b"].tolist() == [3.0, 3.0]


def test_only_values_that_were_there_before_may_be_infinite(tmp_path: Path) -> None:
    mask = torch.tensor([0.0, -torch.inf])
    theta = Theta({"w": torch.zeros(1)}, {"b": mask.clone()})
    outer = server(theta)
    added(outer, tmp_path / "u", "a", 3, torch.tensor([2.0, -torch.inf]))
    with pytest.raises(HyphaError, match="buffer b holds values that are not finite"):
        added(outer, tmp_path / "u", "b", 3, torch.tensor([torch.inf, -torch.inf]))
    added(outer, tmp_path / "u", "b", 1, torch.tensor([6.0, -torch.inf]))
    outer.apply()
    assert theta.buffers["b"].tolist() == [3.0, -torch.inf]
