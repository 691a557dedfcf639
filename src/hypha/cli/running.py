"""From a command to an exit code: signals, one readable message for an error, a bounded end.

SIGINT and SIGTERM cancel what runs and exit with 130 and 143; a second signal, or an end that takes
longer than ``STOP_S``, stops at once. Errors of Hypha's own tree are printed as one message and give their
exit code; anything else is a defect and is logged with its traceback.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, NoReturn

from hypha.errors import AddressTaken, ConfigError, HyphaError, leaves
from hypha.naming import legible, named

if TYPE_CHECKING:
    import typer

    from hypha.config.models import NodeConfig
    from hypha.config.reading.layers import Settings
    from hypha.pki.identity import Identity, IdentityFiles

logger = logging.getLogger("hypha.cli")

#: A clean end takes less; what hangs longer than this after a signal is cut.
STOP_S = 4.5


def run_program(app: typer.Typer) -> NoReturn:
    """Run a Typer app and exit. Usage errors exit with 2, an interrupt between signals with 130."""
    _have_standard_files()
    try:
        app()
    except HyphaError as exc:
        print_error(exc)
        sys.exit(exc.exit_code)
    sys.exit(0)


def _have_standard_files() -> None:
    """Where standard input, output or error were closed by whoever started us, they are the null device: else
    the next file or socket would get their number, and an executor, or a message, would use it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            # the lowest that is free, so this one
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(number, mode, closefd=False, encoding="utf-8"))  # noqa: SIM115


def print_error(exc: HyphaError) -> None:
    """One message on standard error; a ConfigError's problems one a line."""
    if isinstance(exc, ConfigError) and len(exc.problems) > 1:
        print(f"error: {len(exc.problems)} problems", file=sys.stderr)
        for problem in exc.problems:
            print(f"  {legible(named(str(problem)))}", file=sys.stderr)
    else:
        print(f"error: {legible(named(str(exc)))}", file=sys.stderr)


def run_service(
    component: str,
    config: NodeConfig,
    service: Callable[[], Awaitable[int | None]],
    stop_s: float = STOP_S,
) -> int:
    """Run a component until it ends, or a signal comes and then ``stop_s`` at most; returns the exit code.

    Logs and telemetry are as ``config`` says. Raises the HyphaError that ended it.
    """
    import trio

    from hypha.config.environment import process_environment
    from hypha.config.otel import resolve_telemetry
    from hypha.config.reading.log_filter import parse_filter
    from hypha.telemetry.logs import configure_logging
    from hypha.telemetry.resources import watch_process
    from hypha.telemetry.running import keep_sampling, telemetry

    async def observed() -> int | None:
        with watch_process():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keep_sampling, settings.interval_s)
                code = await service()
                nursery.cancel_scope.cancel()
        return code

    settings = resolve_telemetry(component, config, process_environment())
    style = config.log_format
    if style == "auto":
        style = "text" if sys.stderr is not None and sys.stderr.isatty() else "json"
    configure_logging(component, parse_filter(config.log_level), style)
    if not settings.on:
        return run_until_signal(service, stop_s)
    with telemetry(settings.of_instance(identity_of(config, warn=False).peer_id)):
        return run_until_signal(observed, stop_s)


def files_in(settings: Settings) -> IdentityFiles | None:
    """The identity files that are named, whatever else is wrong; None where one is missing."""
    from hypha.pki.identity import IdentityFiles

    cert, key, trust, crls = (settings.get(f"{one}_pem") for one in ("cert", "key", "trust", "crls"))
    return None if None in (cert, key, trust) else IdentityFiles(cert, key, trust, crls)


def identity_of(config: NodeConfig, warn: bool = True) -> Identity:
    """The identity that ``config`` names. Raises IdentityError."""
    from hypha.pki.identity import IdentityFiles, load_identity

    files = IdentityFiles(config.cert_pem, config.key_pem, config.trust_pem, config.crls_pem)
    return load_identity(files, warn=warn)


def check_installed(what: str, *packages: str) -> None:
    """Raises HyphaError where one of ``packages``, without which ``what`` cannot be done, is not there."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise HyphaError(
            f"{what} trains in this installation, and {', '.join(missing)} cannot be imported: install Hypha "
            "with its extra [train] (pip install 'hypha-train[train]')"
        )


def run_until_signal(
    service: Callable[[], Awaitable[int | None]], stop_s: float | None = STOP_S, hangup: bool = False
) -> int:
    """``trio.run`` with SIGINT and SIGTERM as clean stops; returns the exit code, raises HyphaError.

    ``stop_s`` bounds the end; with ``None`` it takes what it takes, and more signals do not hurry it.
    ``hangup``: SIGHUP stops too; else it only does so where somebody sits at a terminal (a daemon's
    SIGHUP means "read your certificates again", which nodes do by themselves every few seconds).
    """
    import trio

    before = signal.getsignal(signal.SIGINT)
    stopping = [0]

    def interrupt(number: int, frame: object) -> None:
        # in force before and after trio's: an impatient second Ctrl-C must not spoil the exit code
        if not stopping[0]:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        return trio.run(_until_signal, service, stop_s, hangup or sys.stdin.isatty(), stopping)
    except BaseExceptionGroup as group:
        raise _one_of(group) from group
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN if stopping[0] else before)


async def _until_signal(
    service: Callable[[], Awaitable[int | None]], stop_s: float | None, hangup: bool, stopping: list[int]
) -> int:
    import trio

    code = 0
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                nonlocal code
                async for number in signals:
                    if number == signal.SIGHUP and not hangup:
                        logger.info(
                            "SIGHUP: changed certificates and revocation lists are read by themselves."
                        )
                        continue
                    if code:
                        if stop_s is not None:
                            os._exit(code)
                        continue
                    code = stopping[0] = 128 + number
                    logger.info("%s: stopping.", signal.Signals(number).name)
                    if stop_s is not None:
                        _end_within(stop_s, code)
                    work.cancel()

            nursery.start_soon(watch)
            with trio.CancelScope() as work:
                ended = await service()
                code = code or ended or 0
            nursery.cancel_scope.cancel()
    return code


def _end_within(limit_s: float, code: int) -> None:
    """Blocking work in a thread cannot be cancelled; do not let it hold up the end."""

    def cut() -> None:
        logger.error("Not stopped within %g s; leaving.", limit_s)
        os._exit(code)

    timer = threading.Timer(limit_s, cut)
    timer.daemon = True
    timer.start()


def _one_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error worth telling: a defect before an error of ours, the first of its kind."""
    found = leaves(group)
    defects = [exc for exc in found if not isinstance(exc, HyphaError | KeyboardInterrupt)]
    if defects:
        return group
    ours = [exc for exc in found if isinstance(exc, HyphaError)]
    problems = [problem for exc in ours if isinstance(exc, ConfigError) for problem in exc.problems]
    if len(problems) > 1:
        passes = all(isinstance(exc, AddressTaken) for exc in ours)
        return AddressTaken(problems) if passes else ConfigError(problems)
    return ours[0] if ours else found[0]
