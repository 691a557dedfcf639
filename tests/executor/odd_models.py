"""Models of plain PyTorch whose tensors are odd, and legal; or whose tensors cannot travel."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn
from torch.nn import functional


class Classifier(nn.Module):
    """Eight numbers a row, three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(self.seen(x))
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}

    def seen(self, x: Tensor) -> Tensor:
        return x


class RunningMean(Classifier):
    """Sets its buffers anew in each forward, as hand-written averages do."""

    mean: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("count", torch.tensor(0))

    def seen(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.count = self.count + 1
        return x - self.mean


class RunningMeanInPlace(RunningMean):
    """What the other one should come to."""

    def seen(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        self.count.add_(1)
        return x - self.mean


class Constants(Classifier):
    """Buffers that training leaves alone, of many types and values."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
        self.register_buffer("unknown", torch.tensor([1.0, torch.nan]))
        self.register_buffer("turns", torch.polar(torch.ones(4), torch.arange(4.0)))
        self.register_buffer("infinite", torch.tensor([complex(torch.inf, 0.0)]))
        self.register_buffer("third", torch.full((8,), 1 / 3))
        self.register_buffer("small", torch.full((2,), 6.0, dtype=torch.float16))
        self.register_buffer("number", torch.tensor(7, dtype=torch.uint16))
        self.register_buffer("expanded", torch.ones(1).expand(5))
        self.register_buffer("turned", torch.arange(6.0).view(2, 3).t())
        self.register_buffer("nothing", torch.zeros(0, 3))
        shared = torch.ones(2)
        self.register_buffer("left", shared)
        self.register_buffer("right", shared)
        self.register_buffer("hidden", torch.zeros(2).to_sparse(), persistent=False)

    def seen(self, x: Tensor) -> Tensor:
        rows = x.view(-1, 2, 4)
        return (rows @ torch.softmax(self.mask, -1)).flatten(1)  # type: ignore[operator]


class ColumnMajor(Classifier):
    """A parameter that is not contiguous, and one of a normalised weight that is computed anew each time."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.utils.parametrizations.weight_norm(self.net)
        self.turned = nn.Parameter(torch.randn(8, 8).t())

    def seen(self, x: Tensor) -> Tensor:
        return x @ self.turned


class Unfit(Classifier):
    """``kind`` says which tensor cannot travel."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "sparse":
            self.register_buffer("adjacency", torch.eye(3).to_sparse())
        elif kind == "complex128":
            self.register_buffer("turns", torch.zeros(2, dtype=torch.complex128))
        elif kind == "lazy":
            self.late = nn.LazyLinear(4)
        elif kind == "infinite":
            self.bias = nn.Parameter(torch.full((8,), -torch.inf), requires_grad=False)
        elif kind == "half":
            self.scale = nn.Parameter(torch.ones(8, dtype=torch.float16))
        elif kind in ("grows", "changes type", "goes away", "diverges"):
            self.register_buffer("state", torch.zeros(2))
        elif kind == "two":
            shared = torch.zeros(2)
            self.register_buffer("left", shared)
            self.register_buffer("right", shared)

    def seen(self, x: Tensor) -> Tensor:
        match self.kind:
            case "grows":
                self.state = torch.zeros(len(self.state) + 1)
            case "changes type":
                self.state = self.state.double()
            case "goes away":
                self.state = None  # type: ignore[assignment]
            case "appears":
                self.register_buffer("late", torch.zeros(1))
            case "diverges":
                self.state = self.state + torch.inf
            case "two":
                self.left = self.left + 1
            case "replaced":
                self.net.bias = nn.Parameter(self.net.bias.detach().clone())
            case _:
                pass
        return x


class Extra(Classifier):
    """Keeps state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}

    def set_extra_state(self, state: object) -> None:
        pass


class LooksAtNumbers(Classifier):
    """Branches on a value, which torch's meta device does not have."""

    def seen(self, x: Tensor) -> Tensor:
        return x if x.abs().sum().item() >= 0 else -x


class Imports(Classifier):
    """Needs what is not installed here."""

    def __init__(self) -> None:
        super().__init__()
        importlib.import_module("a_package_of_workers")
