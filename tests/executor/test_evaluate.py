"""The accuracy of an exported image classifier, on data as training takes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.executor.test_models import RESNET, directory

from hypha.errors import DataError
from hypha.executor import models
from hypha.executor.evaluate import accuracy
from hypha.messages import ModelSpec


def test_pixels_and_labels_are_what_they_are_in_training(tmp_path: Path) -> None:
    spec = ModelSpec(task="image-classification")
    model = models.build(spec, directory(tmp_path / "source", RESNET))
    models.export(model, spec, (), tmp_path / "model")
    pixels = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        said = model.eval()(pixel_values=pixels.float() / 255).logits.argmax(-1)
    labels = said.clone()
    labels[:10] = (labels[:10] + 1) % 10
    data = tmp_path / "data"
    data.mkdir()
    # bytes, and a column of labels
    save_file({"pixel_values": pixels, "labels": labels[:, None]}, data / "slice-0000.safetensors")
    assert accuracy(tmp_path / "model", data) == (0.75, 40)
    save_file({"pixel_values": pixels}, data / "slice-0001.safetensors")
    with pytest.raises(DataError, match="no column labels"):
        accuracy(tmp_path / "model", data)
