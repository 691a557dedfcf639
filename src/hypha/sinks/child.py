"""The process of one metric sink: lines of JSON in, one line of JSON back for each.

The first line is a ``Begin``, every other one a ``RoundValues``; the reply says what went wrong, if anything
did. At the end of its input the sink is closed, and the process ends, as when its scheduler was killed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import BinaryIO

import msgspec

from hypha.sinks.interface import Begin, Reply, RoundValues
from hypha.sinks.tools import SINKS

#: a library that hangs for so long ends with the process: whoever waits has given up before, or was killed
_LIMIT_S = 90


def serve(lines: BinaryIO, replies: BinaryIO) -> None:
    """Until ``lines`` ends. An error of the sink is a reply, and the caller's affair."""

    def answer(error: str) -> None:
        replies.write(msgspec.json.encode(Reply(error)) + b"\n")
        replies.flush()

    first = lines.readline()
    if not first:
        return
    begin = msgspec.json.decode(first, type=Begin)
    secret = begin.destination.token
    sink = SINKS[begin.destination.type]()

    def attempt(what: Callable[[], None]) -> bool:
        signal.alarm(_LIMIT_S)
        try:
            what()
        except Exception as exc:  # noqa: BLE001 - the edge of a service: whatever a foreign library raises
            # third parties quote addresses and headers
            text = f"{type(exc).__name__}: {exc}"
            answer(text.replace(secret, "(the token)") if secret else text)
            return False
        finally:
            signal.alarm(0)
        answer("")
        return True

    if not attempt(lambda: sink.open(begin.destination, begin.run)):
        return
    for line in lines:
        values = msgspec.json.decode(line, type=RoundValues)
        attempt(lambda values=values: sink.record(values))  # type: ignore[misc]
    attempt(sink.close)


def main() -> None:
    """The program: standard input and output are its line to the scheduler, which libraries do not get."""
    lines, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    try:
        serve(lines, replies)
    except BrokenPipeError:
        # the scheduler is gone
        sys.exit(1)


if __name__ == "__main__":
    main()
