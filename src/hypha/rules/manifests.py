"""The hash of a dataset's manifest, and what a manifest must be like to be trained on.

Whoever has a manifest can compute its hash, so nobody has to take anybody's word for it: a data node says it,
and the scheduler computes it again.
"""

from __future__ import annotations

import re

import blake3
import msgspec

from hypha.messages import Manifest
from hypha.rules.contributions import MOST_COUNT

_HASH = re.compile(r"[0-9a-f]{64}")


def manifest_hash(manifest: Manifest) -> str:
    """BLAKE3 in hex over the canonical JSON of what replicas must share."""
    shared = {
        "version": manifest.version,
        "columns": [
            {"name": column.name, "dtype": column.dtype, "shape": column.shape}
            for column in sorted(manifest.columns, key=lambda one: one.name)
        ],
        "slices": [
            {"samples": part.samples, "size": part.size, "blake3": part.blake3} for part in manifest.slices
        ],
    }
    return blake3.blake3(msgspec.json.encode(shared, order="sorted")).hexdigest()


def manifest_problem(manifest: Manifest, stated_hash: str) -> str:
    """Why ``manifest``, which somebody says has ``stated_hash``, cannot be trained on; empty where it can."""
    if not manifest.slices:
        return "its manifest lists no slices"
    for index, part in enumerate(manifest.slices):
        if not (
            1 <= part.samples <= MOST_COUNT and 1 <= part.size <= MOST_COUNT and _HASH.fullmatch(part.blake3)
        ):
            return f"its manifest says of slice {index} what cannot be"
    found = manifest_hash(manifest)
    return "" if found == stated_hash else f"its manifest has the hash {found[:16]}, not {stated_hash[:16]}"
