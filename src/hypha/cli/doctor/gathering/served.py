"""What a data node is to serve, without changing anything of it."""

from __future__ import annotations

from hypha.cli.doctor.gathered import ServiceObservations
from hypha.config.models import DataConfig, DatasetConfig
from hypha.data.manifest import MANIFEST_FILE, load_dataset_directory
from hypha.data.slices import SUFFIX
from hypha.errors import DataError


def gather_served(config: DataConfig) -> ServiceObservations:
    """Reads manifests and looks for the slices; hashes nothing. Blocks for a moment."""
    entries = [*config.datasets, *([DatasetConfig(path=config.dataset_path)] if config.dataset_path else [])]
    names: list[str] = []
    unusable: list[tuple[str, str]] = []
    for entry in entries:
        try:
            names.append(_name_of(entry))
        except DataError as exc:
            unusable.append((str(entry.path), "; ".join(str(exc).splitlines())))
    return ServiceObservations(tuple(names), tuple(unusable))


def _name_of(entry: DatasetConfig) -> str:
    """Raises DataError where it cannot be served."""
    if (entry.path / MANIFEST_FILE).exists():
        return load_dataset_directory(entry.path, entry.name).name
    if not any(entry.path.glob(f"*{SUFFIX}")):
        raise DataError(f"it holds neither {MANIFEST_FILE} nor any slice")
    # the node makes a manifest when it starts, which takes its time
    return entry.name or entry.path.resolve().name
