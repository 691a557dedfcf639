"""Plain PyTorch classifiers of digits: what a fault does has little to do with the model, and an executor
that need not import transformers is there in a third of the time.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class _Classifier(nn.Module):
    layers: nn.Sequential

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(pixel_values)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


class Digits(_Classifier):
    """Convolutions with batch norm, so that there are buffers; 0.3 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_convolution(1, 32, 2),
            *_convolution(32, 32, 1),
            *_convolution(32, 64, 2),
            *_convolution(64, 64, 1),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)),
        )


class Small(_Classifier):
    """One hidden layer, with batch norm too: for jobs whose steps are paced anyway, and for their replays."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
        )


class Unnormed(_Classifier):
    """As small, and no row's output depends on the other rows: the same whatever processes a batch is spread
    over.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def _convolution(channels: int, width: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, width, 3, stride, padding=1), nn.BatchNorm2d(width), nn.ReLU()
