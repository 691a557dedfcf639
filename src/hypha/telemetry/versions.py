"""Which versions a node runs with: what to compare when two nodes of one job do not behave alike."""

from __future__ import annotations

import functools
import platform
from importlib import metadata

from hypha import __version__

#: what messages, weights and arithmetic go through
PACKAGES = (
    "accelerate",
    "libp2p",
    "msgspec",
    "numpy",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "trio",
)


@functools.cache
def versions() -> dict[str, str]:
    """By name: ``hypha``, ``python`` and those of :data:`PACKAGES` that are installed. Reads some files the
    first time.
    """
    found = {"hypha": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
