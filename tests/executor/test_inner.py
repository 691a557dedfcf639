"""Schedules, accumulation, seeds: against torch and transformers themselves."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from hypha.errors import ModelError
from hypha.executor.inner.loop import Inner, accelerator_for, learning_rate_factor, round_seed
from hypha.executor.models.forward import Forward
from hypha.messages import (
    ExecutorDescriptor,
    InnerOptimizer,
    LrSchedule,
    ModelSpec,
    PeerRef,
    TrainJob,
)

SPEC = ModelSpec(task="torch", inputs={"input": "x", "labels": "y"}, loss="mse")


def job(**changes: object) -> TrainJob:
    values: dict[str, object] = {
        "job_id": "job",
        "generation": 0,
        "executor": ExecutorDescriptor(kind="train", name="diloco-transformer"),
        "me": "me",
        "scheduler": PeerRef(peer="scheduler"),
        "parameter_server": PeerRef(peer="server"),
        "model": SPEC,
        "dataset": "toy",
        "batch_size": 4,
    }
    return TrainJob(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["cosine-with-warmup", "linear-with-warmup", "wsd"])
def test_schedules_are_those_of_transformers(kind: str) -> None:
    from transformers import optimization

    schedule = LrSchedule(kind=kind, warmup_steps=5, training_steps=40, decay_steps=12)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = {
        "cosine-with-warmup": lambda: optimization.get_cosine_schedule_with_warmup(optimizer, 5, 40),
        "linear-with-warmup": lambda: optimization.get_linear_schedule_with_warmup(optimizer, 5, 40),
        "wsd": lambda: optimization.get_wsd_schedule(optimizer, 5, 12, num_training_steps=40),
    }[kind]()
    for step in range(41):
        assert learning_rate_factor(schedule, step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()


def test_past_their_end_schedules_stay_at_zero_and_without_an_end_at_one() -> None:
    for kind in ("cosine-with-warmup", "linear-with-warmup", "wsd"):
        ended = LrSchedule(kind=kind, warmup_steps=1, training_steps=10, decay_steps=3)  # type: ignore[arg-type]
        assert learning_rate_factor(ended, 15) == pytest.approx(0.0)
        endless = LrSchedule(kind=kind, warmup_steps=4)  # type: ignore[arg-type]
        assert learning_rate_factor(endless, 2) == 0.5
        assert learning_rate_factor(endless, 10**6) == 1.0
    assert learning_rate_factor(LrSchedule(), 123) == 1.0


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [
        {"x": torch.randn(4, 3, generator=generator), "y": torch.randn(4, 2, generator=generator)}
        for _ in range(count)
    ]


def inner_of(
    model: nn.Module, description: TrainJob, steps: int = 0, scaler: torch.amp.GradScaler | None = None
) -> Inner:
    accelerator = accelerator_for(description) if scaler is None else Accelerator()
    accelerator.scaler = scaler
    forward = Forward(model, description.model)
    return Inner(accelerator.prepare(model), forward, description, accelerator, steps)


def test_inner_steps_are_those_of_plain_adamw_with_its_scheduler() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    plain = copy.deepcopy(model)
    schedule = LrSchedule(kind="cosine-with-warmup", warmup_steps=2, training_steps=10)
    options = InnerOptimizer(learning_rate=0.05, max_grad_norm=0.1)
    inner = inner_of(model, job(optimizer=options, schedule=schedule))
    adam = torch.optim.AdamW(plain.parameters(), lr=0.05)
    rates = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: learning_rate_factor(schedule, step))
    for batch in batches(6):
        loss = inner.batch(batch)
        wanted = nn.functional.mse_loss(plain(batch["x"]), batch["y"])
        torch.testing.assert_close(loss, wanted.detach())
        wanted.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        adam.step()
        rates.step()
        adam.zero_grad()
    assert inner.steps == 6
    assert inner.learning_rate == pytest.approx(rates.get_last_lr()[0])
    torch.testing.assert_close(model.weight, plain.weight, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("needs", ["nothing", "a precision", "its launcher"])
def test_accelerate_is_for_what_needs_it(needs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    AcceleratorState._reset_state()
    if needs == "its launcher":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    made = accelerator_for(job(precision="bf16" if needs == "a precision" else "no"))
    plain = needs == "nothing" and not torch.accelerator.is_available()
    assert isinstance(made, Accelerator) is not plain
    AcceleratorState._reset_state()


def test_a_gradient_scaler_as_fp16_has_it_changes_no_step() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    scaled = copy.deepcopy(model)
    description = job(gradient_accumulation=2)
    scaler = torch.amp.GradScaler("cpu")
    ones = inner_of(model, description), inner_of(scaled, description, scaler=scaler)
    for batch in batches(6):
        for inner in ones:
            inner.batch(batch)
    # the scale is a power of two, so nothing is rounded otherwise
    assert torch.equal(model.weight, scaled.weight)
    assert scaler.get_scale() == 65536.0
    # it was used: it counts the steps that it let pass
    assert scaler.state_dict()["_growth_tracker"] == 3


def test_accumulation_is_one_step_on_all_rows_and_so_is_what_is_left_over() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    large = copy.deepcopy(model)
    accumulating = inner_of(model, job(gradient_accumulation=3))
    at_once = inner_of(large, job())
    parts = batches(5)
    for batch in parts:
        accumulating.batch(batch)
    assert accumulating.steps == 1
    accumulating.flush()
    accumulating.flush()
    assert accumulating.steps == 2
    for group in (parts[:3], parts[3:]):
        at_once.batch({name: torch.cat([batch[name] for batch in group]) for name in ("x", "y")})
    torch.testing.assert_close(model.weight, large.weight, atol=1e-6, rtol=1e-5)


def test_dropout_is_the_same_again_from_the_seed_of_a_round_and_worker() -> None:
    seeds = {round_seed(0, "a", 1), round_seed(0, "a", 2), round_seed(0, "b", 1), round_seed(1, "a", 1)}
    assert len(seeds) == 4
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    layer = nn.Dropout(0.5)
    drawn = []
    for _ in range(2):
        torch.manual_seed(round_seed(0, "a", 1))
        drawn.append(layer(torch.ones(100)))
    assert torch.equal(*drawn)


def test_bf16_trains_and_keeps_its_weights_in_fp32() -> None:
    # accelerate has one precision a process
    AcceleratorState._reset_state()
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    inner = inner_of(model, job(precision="bf16"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert inner.batch(batches(1)[0]).isfinite()
    assert model.weight.dtype == torch.float32
    assert not torch.equal(model.weight, before)
    AcceleratorState._reset_state()


def test_a_model_without_anything_to_train_is_refused() -> None:
    with pytest.raises(ModelError, match="no parameter"):
        inner_of(nn.Linear(3, 2).requires_grad_(False), job())


def test_a_batch_of_one_row_and_batch_norm_is_a_model_error_with_a_remedy() -> None:
    inner = inner_of(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), job())
    inner.batch(batches(1)[0])
    with pytest.raises(ModelError, match=r"rounds\.batch_size \(and max_batch_size\) to 2 or more"):
        inner.batch({name: value[:1] for name, value in batches(1)[0].items()})


def test_an_optimizer_that_was_given_up_leaves_no_state_behind() -> None:
    made = job(optimizer=InnerOptimizer(max_grad_norm=1.0))
    accelerator = accelerator_for(made)
    model = nn.Linear(3, 2)
    columns = {"x": torch.randn(4, 3), "y": torch.randn(4, 2)}

    def train() -> weakref.ref[object]:
        inner = Inner(model, Forward(model, SPEC), made, accelerator, 0)
        inner.batch(columns)
        return weakref.ref(inner._optimizer)

    given_up = [train() for _ in range(3)]
    gc.collect()
    assert [one() for one in given_up] == [None] * 3


def test_gradients_are_clipped_to_their_norm() -> None:
    torch.manual_seed(0)
    made = job(optimizer=InnerOptimizer(learning_rate=1e-2, max_grad_norm=0.1))
    model, columns = nn.Linear(3, 2), {"x": 9 * torch.randn(4, 3), "y": torch.randn(4, 2)}
    plain = copy.deepcopy(model)
    Inner(model, Forward(model, SPEC), made, accelerator_for(made), 0).batch(columns)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=made.optimizer.weight_decay)
    nn.functional.mse_loss(plain(columns["x"]), columns["y"]).backward()
    assert nn.utils.clip_grad_norm_(plain.parameters(), 0.1) > 0.1
    optimizer.step()
    assert torch.equal(model.weight, plain.weight)
