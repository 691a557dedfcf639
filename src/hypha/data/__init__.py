"""Prepare datasets, verify them, and serve them with :func:`run_data`, a data node from start to end."""

from hypha.data.manifest import Dataset, load_dataset_directory, read_manifest
from hypha.data.options import PrepareOptions
from hypha.data.preparing.prepare import Prepared, Survey, prepare, survey
from hypha.data.serving.serve import run_data
from hypha.data.verify import verify
from hypha.rules.manifests import manifest_hash

__all__ = [
    "Dataset",
    "PrepareOptions",
    "Prepared",
    "Survey",
    "load_dataset_directory",
    "manifest_hash",
    "prepare",
    "read_manifest",
    "run_data",
    "survey",
    "verify",
]
