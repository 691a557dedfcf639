"""The environment handed to executors: enough to run a program, nothing that is the worker's own.

An allow-list, because a worker's environment holds secrets (``HF_TOKEN``, cloud credentials,
``HYPHA_*``) that a job, which is somebody else's program, must not see.
"""

from __future__ import annotations

from collections.abc import Mapping

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


def child_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """What of ``environment`` (default: this process's) an executor inherits."""
    source = process_environment() if environment is None else environment
    return {name: value for name, value in source.items() if name in _NAMES or name.startswith(_PREFIXES)}
