"""How good is an exported image classifier? ``python -m hypha.executor.evaluate MODEL DATASET`` prints it.

``DATASET`` is a prepared dataset (safetensors slices) with ``pixel_values`` and ``labels``; the answer is one
line of JSON: ``{"accuracy": 0.97, "samples": 360}``. It loads the model as any user would, with
``from_pretrained``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from hypha.errors import DataError, HyphaError, ModelError
from hypha.executor.forward import pixels

BATCH = 256


def accuracy(model_directory: Path, dataset: Path) -> tuple[float, int]:
    """Share of the samples that the model labels rightly, and how many there are.

    Raises ModelError when the model cannot be loaded, DataError when there is nothing to label.
    """
    from transformers import AutoModelForImageClassification

    try:
        model = AutoModelForImageClassification.from_pretrained(
            model_directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as exc:
        raise ModelError(f"the model in {model_directory} cannot be loaded: {exc}") from exc
    model.eval()
    right = total = 0
    for path in sorted(dataset.glob("*.safetensors")):
        columns = load_file(path)
        if missing := {"pixel_values", "labels"} - columns.keys():
            raise DataError(f"{path}: it has no column {', '.join(sorted(missing))}")
        for start in range(0, len(columns["labels"]), BATCH):
            images = pixels(columns["pixel_values"][start : start + BATCH])
            labels = columns["labels"][start : start + BATCH].flatten()
            with torch.no_grad():
                right += int((model(pixel_values=images).logits.argmax(dim=-1) == labels).sum())
            total += len(labels)
    if not total:
        raise DataError(f"{dataset}: there is no sample to evaluate on")
    return right / total, total


def main(arguments: list[str]) -> int:
    """The program; its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("dataset", type=Path)
    options = parser.parse_args(arguments)
    try:
        share, samples = accuracy(options.model, options.dataset)
    except HyphaError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
    print(json.dumps({"accuracy": share, "samples": samples}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
