"""Notices that this machine ends soon: a file that appears, a command that succeeds, an address that tells.

All of the ``[preemption]`` table that are set are looked at every ``poll_s`` seconds; the first notice has
the worker leave within what is left of ``notice_s``. What cannot be looked at is no notice, and logged once.
"""

from __future__ import annotations

import logging
import re
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from hypha.config.environment import child_environment
from hypha.config.models import PreemptionConfig
from hypha.runtime import in_thread

logger = logging.getLogger(__name__)

#: A look takes this long at most; a command that takes longer is killed.
LOOK_S = 5.0
#: The end of the worker's own process takes so much of a notice.
END_S = 1.0
#: of an answer, what is searched for the pattern
_MAX_BODY_BYTES = 1 << 16


def notice_left_s(config: PreemptionConfig, polled: bool) -> float | None:
    """Of a notice that was just seen, how long the worker may take to leave; None where none is expected. A
    polled one may be ``poll_s`` old.
    """
    if config.notice_s is None:
        return None
    spent_s = END_S + (config.poll_s if polled else 0.0)
    return max(config.notice_s / 2.0, config.notice_s - spent_s)


async def watch_for_notice(config: PreemptionConfig) -> str:
    """Wait for a notice; what it was, in words. Never returns where none is configured."""
    looks: dict[str, Callable[[], Awaitable[bool]]] = {}
    if config.file is not None:
        looks["preemption.file is there"] = partial(in_thread, config.file.exists)
    if config.command:
        looks["preemption.command says so"] = partial(_run_command, config.command)
    if config.url is not None:
        looks["preemption.url says so"] = partial(_ask_url, config.url, config)
    failing: set[str] = set()
    if not looks:
        await trio.sleep_forever()
    while True:
        for notice, look in looks.items():
            try:
                found = await look()
            except (OSError, _NoLook) as exc:
                if notice not in failing:
                    failing.add(notice)
                    logger.warning("A notice of this machine's end would not be noticed: %s.", exc)
                continue
            if notice in failing:
                failing.discard(notice)
                logger.info("Notices of this machine's end are looked for again.")
            if found:
                return notice
        await trio.sleep(config.poll_s)


class _NoLook(Exception):
    """It is not known whether there is a notice."""


async def _kill(process: trio.Process) -> None:
    process.kill()


async def _run_command(command: Sequence[str]) -> bool:
    with trio.move_on_after(LOOK_S):
        ended = await trio.run_process(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
            deliver_cancel=_kill,
            env=dict(child_environment()),
        )
        if ended.returncode < 0:
            raise _NoLook(f"preemption.command ({command[0]}) was ended by signal {-ended.returncode}")
        return ended.returncode == 0
    raise _NoLook(f"preemption.command ({command[0]}) did not end within {LOOK_S:g} s")


async def _ask_url(url: str, config: PreemptionConfig) -> bool:
    import httpx

    try:
        with trio.fail_after(LOOK_S):
            # the service is on this machine's own link: no proxy knows the way
            async with (
                httpx.AsyncClient(timeout=LOOK_S, trust_env=False) as client,
                client.stream("GET", url, headers=config.url_headers) as answer,
            ):
                if answer.status_code != httpx.codes.OK:
                    return False
                body = b""
                async for part in answer.aiter_bytes():
                    body += part
                    if len(body) >= _MAX_BODY_BYTES:
                        break
    except (httpx.HTTPError, httpx.InvalidURL, trio.TooSlowError) as exc:
        raise _NoLook(f"{url} does not answer: {exc or type(exc).__name__}") from exc
    return re.search(config.url_pattern, body[:_MAX_BODY_BYTES].decode("utf-8", "replace")) is not None
