"""The one door to the process environment: nothing else in Hypha reads or changes ``os.environ``; and what
executors inherit of it: enough to run a program, nothing that is the worker's own.

That is an allow-list, because a worker's environment holds secrets (``HF_TOKEN``, cloud credentials,
``HYPHA_*``) that a job, which is somebody else's program, must not see.
"""

from __future__ import annotations

import os
import resource
import urllib.request
from collections.abc import Mapping
from pathlib import Path

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


def process_environment() -> Mapping[str, str]:
    """A copy of this process's environment variables."""
    return dict(os.environ)


def variable(name: str) -> str | None:
    """One variable of this process's environment; ``None`` when it is unset or empty."""
    return os.environ.get(name) or None


def goes_by_proxy(scheme: str, host: str) -> bool:
    """Whether the environment (``HTTPS_PROXY``, ``NO_PROXY``) sends requests to ``host`` through a proxy."""
    proxies = urllib.request.getproxies()
    return bool(proxies.get(scheme) or proxies.get("all")) and not urllib.request.proxy_bypass(host)


def set_variable(name: str, value: str) -> None:
    """For libraries that are yet to be loaded, and for child processes."""
    os.environ[name] = value


def replace_environment(variables: Mapping[str, str]) -> None:
    """``variables`` become all that there is. The C library's copies are made anew, so that nobody reads the
    memory any more in which this process was given its environment.
    """
    os.environ.clear()
    os.environ.update(variables)


def child_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """What of ``environment`` (default: this process's) an executor inherits."""
    source = os.environ if environment is None else environment
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
