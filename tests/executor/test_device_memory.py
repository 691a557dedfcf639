"""What of a GPU's memory an executor may use. That torch holds it to that is a GPU's business to show."""

from __future__ import annotations

import pytest
import torch

from hypha.errors import ModelError
from hypha.executor.inner.local_model import VARIABLE, bytes_allowed, cap_memory, share_of
from hypha.worker.limits.gpus import MEMORY_VARIABLE


def test_worker_and_executor_mean_the_same_variable() -> None:
    assert VARIABLE == MEMORY_VARIABLE


def test_the_share_is_that_of_this_gpu() -> None:
    assert share_of(12 * 10**9, 48 * 10**9) == 0.25
    assert share_of(80 * 10**9, 48 * 10**9) == 1.0, "no more than there is"
    assert share_of(0, 48 * 10**9) == 1.0
    assert bytes_allowed(None) == bytes_allowed("") == 0


def test_what_is_no_amount_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="mend the executor's env"):
        bytes_allowed("12 GB")
    monkeypatch.setenv(VARIABLE, "much")
    cap_memory(torch.device("cpu"))
    with pytest.raises(ModelError, match=VARIABLE):
        cap_memory(torch.device("cuda", 0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_torch_holds_an_executor_to_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(10**9))
    cap_memory(torch.device("cuda", 0))
    torch.empty(5 * 10**8, dtype=torch.uint8, device="cuda:0")
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2 * 10**9, dtype=torch.uint8, device="cuda:0")
