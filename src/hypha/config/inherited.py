"""What executors inherit: of the environment enough to run a program, nothing that is the worker's own.

An allow-list, because a worker's environment holds secrets (``HF_TOKEN``, cloud credentials,
``HYPHA_*``) that a job, which is somebody else's program, must not see.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from pathlib import Path

from hypha.config.environment import process_environment

_NAMES = frozenset(
    {
        "PATH", "HOME", "USER", "LOGNAME", "SHELL", "TZ", "TMPDIR", "LANG", "LANGUAGE", "TERM",
        "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "PYTHONHOME", "PYTHONUNBUFFERED",
        "PYTHONDONTWRITEBYTECODE", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "XDG_CACHE_HOME",
        "XDG_RUNTIME_DIR", "HF_HOME", "TORCH_HOME", "SSL_CERT_FILE", "SSL_CERT_DIR",
        "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES",
        "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES",
    }
)  # fmt: skip
_PREFIXES = ("LC_",)
_LIMITS = tuple(sorted(name for name in dir(resource) if name.startswith("RLIMIT_")))


def child_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """What of ``environment`` (default: this process's) an executor inherits."""
    source = process_environment() if environment is None else environment
    return {name: value for name, value in source.items() if name in _NAMES or name.startswith(_PREFIXES)}


def inherited_state() -> dict[str, str]:
    """What else a child process has from this one (Linux): whose it is, its cores, limits and namespaces.

    Network and mount namespaces are not among it: an executor reaches its worker, and nothing else, by a Unix
    socket in a directory that both see.
    """
    status = dict(
        line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line
    )
    limits = {name: resource.getrlimit(getattr(resource, name)) for name in _LIMITS}
    return {
        **{name: status.get(name, "").strip() for name in ("Uid", "Gid", "Groups", "Umask")},
        "cores": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "niceness": str(os.getpriority(os.PRIO_PROCESS, 0)),
        **{f"{name} namespace": os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "user")},
        **{name: f"{soft}/{hard}" for name, (soft, hard) in limits.items()},
    }
