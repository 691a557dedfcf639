"""How large a job's model is, by the headers of its weight files alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hypha.config.job import JobConfig
from hypha.decoding import decode
from hypha.errors import Undecodable

#: the format's own limit is 100 MB; headers have some kilobytes
_MAX_HEADER_BYTES = 16 << 20


def parameters_of(job: JobConfig) -> int | None:
    """Numbers in all tensors of the model's safetensors files, where its directory is here and has any."""
    if job.model.path is None or not job.model.path.is_dir():
        return None
    counts = [_numbers(path) for path in sorted(job.model.path.glob("*.safetensors"))]
    return sum(counts) or None


def _numbers(path: Path) -> int:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: Any = decode(json.loads, file.read(min(size, _MAX_HEADER_BYTES)))
        return sum(math.prod(one["shape"]) for key, one in header.items() if key != "__metadata__")
    except (OSError, Undecodable, AttributeError, KeyError, TypeError):
        return 0
