"""Which logs are wanted: the ``RUST_LOG`` way to write it.

A filter is a list such as ``info,hypha_network=debug``: a bare level is for Hypha itself, ``name=level``
for one logger and those below it, ``hypha_network`` alone for all that it logs. ``hypha_network``,
``hypha-network``, ``hypha::network`` and ``hypha.net`` name the same package. Later entries win.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

#: Below DEBUG: very detailed execution flow.
TRACE = 5

LEVELS: Mapping[str, int] = {
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": TRACE,
    "off": logging.CRITICAL + 10,
}

#: Hypha, or a package of it
_ROOM = re.compile(r"hypha(?:(?:[_.-]|::)\w+)*")
#: Packages under the name that operations.md calls them by.
_ROOMS = {"network": "net", "certutil": "cli"}


@dataclass(frozen=True)
class LogFilter:
    """A parsed filter: the level of Hypha itself, and of named loggers."""

    level: int = logging.INFO
    loggers: tuple[tuple[str, int], ...] = ()


def parse_filter(text: str) -> LogFilter:
    """Parse ``hypha=info,hypha_network=debug``; ValueError says what is wrong."""
    level = logging.INFO
    loggers: dict[str, int] = {}
    for part in (piece.strip() for piece in text.split(",")):
        if not part:
            continue
        name, equals, word = part.rpartition("=")
        number = LEVELS.get(word.strip().lower())
        if number is None and not equals and _ROOM.fullmatch(word):
            name, number = word, TRACE
        if number is None or (equals and not name.strip()):
            raise ValueError(
                f"{part!r} is no log level; write error, warn, info, debug, trace or off, or name=level"
            )
        logger = _logger_name(name.strip())
        if logger in ("", "hypha"):
            level = number
        else:
            loggers[logger] = number
    return LogFilter(level, tuple(loggers.items()))


def _logger_name(name: str) -> str:
    name = re.sub(r"^hypha[_-]", "hypha.", name.replace("::", "."))
    parts = name.split(".")
    if parts[0] == "hypha" and len(parts) > 1:
        parts[1] = _ROOMS.get(parts[1], parts[1])
    return ".".join(parts)
