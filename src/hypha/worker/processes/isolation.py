"""``runtime = "bwrap"``: an executor in namespaces of its own, by bubblewrap.

It sees its job directory (read-only what it only reads), its bridge, the GPUs that its lease pays for, Python
with Hypha and the system's libraries, read-only, and what its owner lists as ``read_only``. It has no
network, no other process, no home directory, no capabilities, and can make no further namespaces. So it is
kept from the worker's key and cache, from other jobs and from the environment of other processes.

bubblewrap need not be set-uid: where user namespaces are not allowed, :func:`check_bubblewrap` says so when
the worker starts. GPU drivers are reached through their device files, whose interface is as wide as ever.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from glob import glob
from pathlib import Path

from hypha.config.models import ExecutorConfig, WorkerConfig
from hypha.errors import ConfigError, HyphaError, Problem
from hypha.worker.jobs.directory import READ_PARTS, JobDirectory
from hypha.worker.limits.gpus import sees_no_gpu
from hypha.worker.processes.keepers import KEEPER, Launch

BUBBLEWRAP = "bwrap"
_PROBE_S = 20.0

_NAMESPACES = (
    "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts",
    "--unshare-cgroup-try", "--disable-userns", "--cap-drop", "ALL", "--die-with-parent",
)  # fmt: skip
#: Links on a system whose / has no directories of its own for them, directories elsewhere.
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
#: What the dynamic loader, the C library and numeric libraries look at. /etc/ssl/private is not among it.
_SYSTEM_FILES = (
    "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime",
    "/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/ssl/certs", "/etc/ssl/openssl.cnf",
    "/etc/pki/tls/certs", "/sys/devices/system/cpu", "/sys/devices/system/node",
)  # fmt: skip
_GPU_DEVICES = ("/dev/nvidia*", "/dev/nvidia-caps/*", "/dev/dri/*", "/dev/kfd")
_GPU_FILES = ("/sys/bus/pci", "/sys/devices", "/sys/class/drm", "/sys/class/kfd", "/sys/module/nvidia")
#: Lists of directories that libraries and modules are looked for in.
_SEARCHED = ("PYTHONPATH", "LD_LIBRARY_PATH")
_HOME = "/tmp/home"
#: Directories of the owner's, which are not there.
_HOMES = ("XDG_CACHE_HOME", "XDG_RUNTIME_DIR", "HF_HOME", "TORCH_HOME")
#: SIGTERM goes to the whole process group. bubblewrap must outlive it, or it would take along the executor,
#: which is to end by itself; so the signal is ignored from the keeper on, and no longer by the executor.
_IGNORE = ("--ignore", "SIGTERM")
_BECOME = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def isolate(
    launch: Launch, executor: ExecutorConfig, directory: JobDirectory, config: WorkerConfig
) -> Launch:
    """``launch`` below bubblewrap, to be started cold: a host's forks share its namespaces.

    Raises :class:`HyphaError` when there is no bubblewrap, or the executor would see all of the machine.
    """
    bubblewrap = shutil.which(BUBBLEWRAP)
    if bubblewrap is None:
        raise HyphaError(_advice("it is not installed"))
    environment = {name: value for name, value in launch.environment.items() if name not in _HOMES}
    environment |= {
        "HOME": _HOME,
        "TMPDIR": "/tmp",
        **{name: launch.environment[name] for name in executor.env},
    }
    argv = [
        bubblewrap,
        *_NAMESPACES,
        *_system(),
        *_read_only(launch, executor, config),
        *_devices(environment),
        *_job(directory),
        "--chdir",
        str(directory.path),
        "--",
        *(sys.executable, "-I", "-S", "-c", _BECOME),
        *launch.argv,
    ]
    return replace(
        launch,
        argv=tuple(argv),
        environment=environment,
        keeper_options=(*_IGNORE, *launch.keeper_options),
        own="",
        isolated=True,
    )


def check_bubblewrap(config: WorkerConfig) -> None:
    """Try it, where an executor of ``config`` wants it; blocks for a moment. Raises :class:`ConfigError`."""
    wanted = [index for index, one in enumerate(config.executors) if one.runtime == "bwrap"]
    if not wanted:
        return
    if (why := _trouble()) is not None:
        raise ConfigError([Problem(f"executors[{wanted[0]}].runtime", _advice(why))])


def _trouble() -> str | None:
    """Why bubblewrap is not to be had here."""
    bubblewrap = shutil.which(BUBBLEWRAP)
    if bubblewrap is None:
        return "it is not installed"
    try:
        tried = subprocess.run(
            [bubblewrap, *_NAMESPACES, *_system(), "--", "true"],
            capture_output=True,
            text=True,
            timeout=_PROBE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return str(exc)
    return None if tried.returncode == 0 else tried.stderr.strip() or f"exit code {tried.returncode}"


def _advice(why: str) -> str:
    return (
        f"bubblewrap cannot be used here ({why}). Install it (Debian: apt-get install bubblewrap, 0.8 or "
        "later) and allow user namespaces (sysctl user.max_user_namespaces, "
        'kernel.unprivileged_userns_clone, or an AppArmor profile that has "userns"), or set '
        'runtime = "process"'
    )


def _system() -> Iterator[str]:
    for name in _SYSTEM:
        path = Path(name)
        if path.is_symlink():
            yield from ("--symlink", os.readlink(path), name)
        elif path.is_dir():
            yield from ("--ro-bind", name, name)
    # where the worker is root its executors are, without capabilities: /proc/sys asks for no more than that
    yield from ("--proc", "/proc", "--remount-ro", "/proc")
    yield from ("--dev", "/dev", "--tmpfs", "/tmp", "--dir", _HOME)
    for name in _SYSTEM_FILES:
        yield from ("--ro-bind-try", name, name)


def _read_only(launch: Launch, executor: ExecutorConfig, config: WorkerConfig) -> Iterator[str]:
    """Python, Hypha, and what else the program needs, without what of the worker's lies below those."""
    wanted = [Path(sys.prefix), Path(sys.base_prefix), KEEPER.parent.parent]
    wanted += [hop.parent for hop in _hops(Path(sys.executable))]
    for name in _SEARCHED:
        wanted += map(Path, filter(None, launch.environment.get(name, "").split(os.pathsep)))
    wanted += executor.read_only
    wanted += [] if executor.accelerate is None else [executor.accelerate.absolute()]
    if program := shutil.which(launch.argv[0], path=launch.environment.get("PATH")):
        wanted += _hops(Path(program))
    shown = _outermost(path for path in wanted if path.is_absolute() and path.exists())
    if Path("/") in shown:
        raise HyphaError("an executor with the runtime bwrap cannot see all of /: see read_only, PYTHONPATH")
    for path in shown:
        yield from ("--ro-bind", str(path), str(path))
    hidden = [path for path in (config.work_dir.resolve(), config.key_pem.resolve()) if _below(path, shown)]
    for path in hidden:
        yield from ("--tmpfs", str(path)) if path.is_dir() else ("--ro-bind", os.devnull, str(path))


def _devices(environment: Mapping[str, str]) -> Iterator[str]:
    """GPUs; none for a lease that reserved none."""
    if sees_no_gpu(environment):
        return
    devices = sorted(name for pattern in _GPU_DEVICES for name in glob(pattern))
    for name in devices:
        yield from ("--dev-bind", name, name)
    for name in _GPU_FILES if devices else ():
        yield from ("--ro-bind-try", name, name)


def _job(directory: JobDirectory) -> Iterator[str]:
    """The job directory. What is read only may be other jobs', too: cached slices have several names."""
    yield from ("--bind", str(directory.path), str(directory.path))
    for name in READ_PARTS:
        yield from ("--ro-bind", str(directory.part(name)), str(directory.part(name)))
    if directory.socket_path.parent != directory.path:
        yield from ("--ro-bind", str(directory.socket_path.parent), str(directory.socket_path.parent))


def _hops(path: Path) -> list[Path]:
    """``path``, and where its links lead, one after the other."""
    found = [path.absolute()]
    while found[-1].is_symlink() and len(found) < 20:
        found.append(Path(os.path.normpath(found[-1].parent / os.readlink(found[-1]))))
    return found


def _outermost(paths: Iterable[Path]) -> list[Path]:
    """Without those inside another one; parents first."""
    found: list[Path] = []
    for path in sorted({Path(os.path.normpath(path)) for path in paths}, key=lambda path: len(path.parts)):
        if not _below(path, found) and not _below(path, map(Path, _SYSTEM)):
            found.append(path)
    return found


def _below(path: Path, places: Iterable[Path]) -> bool:
    return any(path.is_relative_to(place) for place in places)
