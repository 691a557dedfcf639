"""Hypha pools ordinary, badly connected machines into one trainer (DiLoCo over libp2p).

What ``__all__`` names may be relied on; everything else is private, and may change with any version. A name
is imported when it is first used, so that ``import hypha`` alone costs nothing.
"""

from __future__ import annotations

__all__ = [
    "AllocationFailed",
    "CaFiles",
    "ConfigError",
    "DataConfig",
    "DataError",
    "Dataset",
    "GatewayConfig",
    "HyphaError",
    "IdentityError",
    "JobFailed",
    "JobResult",
    "LedgerFile",
    "LedgerRound",
    "MadeFiles",
    "Manifest",
    "NetworkError",
    "PrepareOptions",
    "Prepared",
    "Refused",
    "Replayed",
    "SchedulerConfig",
    "WorkerConfig",
    "__version__",
    "evaluate",
    "load_config",
    "load_dataset_directory",
    "make_node",
    "make_org",
    "make_root",
    "prepare",
    "read_ledger",
    "replay",
    "run_data",
    "run_gateway",
    "run_job",
    "run_worker",
]

__version__ = "0.1.0"

# as in typing, which takes a keeper longer to import than all that it needs
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hypha.config.models import DataConfig, GatewayConfig, SchedulerConfig, WorkerConfig
    from hypha.config.reading.loading import load_config
    from hypha.data import Dataset, Prepared, PrepareOptions, load_dataset_directory, prepare, run_data
    from hypha.errors import (
        AllocationFailed,
        ConfigError,
        DataError,
        HyphaError,
        IdentityError,
        JobFailed,
        NetworkError,
        Refused,
    )
    from hypha.executor.evaluate import evaluate
    from hypha.executor.replay import Replayed, replay
    from hypha.gateway import run_gateway
    from hypha.messages import LedgerFile, LedgerRound, Manifest
    from hypha.pki.authority import CaFiles, MadeFiles, make_node, make_org, make_root
    from hypha.scheduler.durable.ledger import read_ledger
    from hypha.scheduler.job.run import run_job
    from hypha.scheduler.job.states import JobResult
    from hypha.worker.node import run_worker

_MODULES = {
    "hypha.config.models": ("DataConfig", "GatewayConfig", "SchedulerConfig", "WorkerConfig"),
    "hypha.config.reading.loading": ("load_config",),
    "hypha.data": (
        "Dataset",
        "PrepareOptions",
        "Prepared",
        "load_dataset_directory",
        "prepare",
        "run_data",
    ),
    "hypha.errors": (
        "AllocationFailed",
        "ConfigError",
        "DataError",
        "HyphaError",
        "IdentityError",
        "JobFailed",
        "NetworkError",
        "Refused",
    ),
    "hypha.executor.evaluate": ("evaluate",),
    "hypha.executor.replay": ("Replayed", "replay"),
    "hypha.gateway": ("run_gateway",),
    "hypha.messages": ("LedgerFile", "LedgerRound", "Manifest"),
    "hypha.pki.authority": ("CaFiles", "MadeFiles", "make_node", "make_org", "make_root"),
    "hypha.scheduler.durable.ledger": ("read_ledger",),
    "hypha.scheduler.job.run": ("run_job",),
    "hypha.scheduler.job.states": ("JobResult",),
    "hypha.worker.node": ("run_worker",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            from importlib import import_module

            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
