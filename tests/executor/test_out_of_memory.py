"""Batches that do not fit: with allocations that really fail."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.executor.test_inner import batches, inner_of, job
from torch import Tensor, nn

from hypha.executor.inner.batch_size import RowsAtATime, is_out_of_memory
from hypha.executor.inner.loop import Inner, Processor
from hypha.executor.models.forward import Forward
from hypha.executor.running import kind_of
from hypha.messages import InnerOptimizer, ModelSpec


class Hungry(nn.Module):
    """Two layers around one that, for more than ``rows`` rows, wants more memory than any machine has: on the
    way forward, or back, when the second layer has its gradients already.
    """

    def __init__(self, rows: int, back: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.rows, self.back = rows, back
        self.tried: list[int] = []

    def forward(self, input: Tensor) -> Tensor:
        self.tried.append(len(input))
        hidden = self.first(input)
        if len(input) > self.rows and not self.back:
            allocate_far_too_much()
        if len(input) > self.rows:
            hidden.register_hook(lambda gradient: allocate_far_too_much())
        output: Tensor = self.second(hidden)
        return output


def allocate_far_too_much() -> None:
    torch.empty(1 << 46)


@pytest.mark.parametrize("back", [False, True], ids=["forward", "backward"])
def test_a_batch_that_does_not_fit_is_halved_and_the_step_is_the_same(
    back: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    hungry = Hungry(2, back)
    plain = Hungry(99, back)
    plain.load_state_dict(hungry.state_dict())
    description = job(gradient_accumulation=3, optimizer=InnerOptimizer(max_grad_norm=0.1))
    small, large = inner_of(hungry, description), inner_of(plain, description)
    parts = batches(5)
    for number, batch in enumerate(parts):
        # the third of an optimizer step is the first one that does not fit
        hungry.rows = 99 if number < 2 else 2
        torch.testing.assert_close(small.batch(batch), large.batch(batch))
    small.flush()
    large.flush()
    assert small.steps == large.steps == 2
    for one, other in zip(hungry.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    rows = len(parts[0]["x"])
    assert max(hungry.tried[-4:]) <= 2 < rows
    assert f"{rows} rows at a time do not fit into memory" in caplog.text


def test_one_row_that_does_not_fit_is_out_of_memory() -> None:
    inner = inner_of(Hungry(0, False), job())
    with pytest.raises(RuntimeError) as failed:
        inner.batch(batches(1)[0])
    assert is_out_of_memory(failed.value)
    assert kind_of(failed.value) == "oom"


def test_a_job_may_say_how_many_rows_go_through_the_model_at_a_time() -> None:
    model = Hungry(99, False)
    inner = inner_of(model, job(micro_batch_size=3))
    inner.batch({name: torch.cat([one[name] for one in batches(2)])[:8] for name in ("x", "y")})
    assert sorted(model.tried) == [2, 3, 3]


def test_parts_of_texts_count_by_the_labels_that_count() -> None:
    """The mean over a batch's tokens is not that of its rows' means."""
    torch.manual_seed(0)
    model = nn.Linear(2, 3)
    whole = copy.deepcopy(model)
    spec = ModelSpec(task="torch", inputs={"input": "x", "labels": "label"}, loss="cross-entropy")
    label = torch.tensor([[0, 1, 2], [1, -100, -100], [-100, -100, -100], [2, 2, -100]])
    columns = {"x": torch.randn(4, 3, 2), "label": label}
    at_once = Inner(whole, Forward(whole, spec), job(), Processor(), 0)
    one_by_one = Inner(model, Forward(model, spec), job(micro_batch_size=1), Processor(), 0)
    torch.testing.assert_close(one_by_one.batch(columns), at_once.batch(columns))
    torch.testing.assert_close(model.weight, whole.weight, atol=1e-6, rtol=1e-5)


def test_more_rows_are_tried_again_ever_more_seldom() -> None:
    rows = RowsAtATime()
    assert rows.parts(16) == 1
    assert rows.failed(16)
    assert rows.failed(16)
    assert rows.parts(16) == 4
    tried = []
    for number in range(1, 700):
        if rows.parts(16) < 4:
            tried.append(number)
            assert rows.failed(16)
        else:
            rows.fitted(16)
    assert tried == [65, 194, 451]
    assert not RowsAtATime(least=2).failed(3)
