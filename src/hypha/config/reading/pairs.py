"""``key=value,key=value``: how OpenTelemetry's variables, and the original's files, write a small table."""

from __future__ import annotations

from urllib.parse import unquote


def pairs_of(value: object) -> object:
    """Text as a table, percent-encoding undone; anything else as it is. Raises ValueError."""
    if not isinstance(value, str):
        return value
    found: dict[str, str] = {}
    for part in value.split(","):
        if not part.strip():
            continue
        key, equals, text = part.partition("=")
        if not equals or not key.strip():
            # the text itself may be a secret
            raise ValueError("it should be a table, or text such as key=value,key=value")
        found[unquote(key.strip())] = unquote(text.strip())
    return found
