"""Where something is wrong in a TOML file: on which line each key stands, and what is no TOML at all.

``tomllib`` does not say where keys are. What looks for them has it read one statement after the other of a
text that it has accepted, and the lists in them line by line.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from hypha.errors import Problem

KeyPath = tuple[str | int, ...]

#: what ends the lists that a statement has begun on an earlier line
_ENDS = ("", "]", "]]", "]]]")


@lru_cache(maxsize=1)
def key_lines(text: str) -> dict[KeyPath, int]:
    """1-based line of every key, table and array entry of a valid TOML ``text``, by path."""
    lines: dict[KeyPath, int] = {}
    entries: dict[KeyPath, int] = {}
    table: KeyPath = ()
    statement, since = "", 1
    for number, line in enumerate(text.split("\n"), 1):
        statement += line + "\n"
        for end in _ENDS:
            if (parsed := _parsed(statement + end)) is not None:
                break
        else:
            continue
        if statement.lstrip().startswith("["):
            table = _header(parsed, entries)
            for length in range(1, len(table) + 1):
                lines.setdefault(table[:length], since)
        else:
            for path in _paths(parsed):
                lines.setdefault((*table, *path), since)
        since = number + 1
        if not end:
            statement = ""
    return lines


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None


def _header(parsed: dict[str, Any], entries: dict[KeyPath, int]) -> KeyPath:
    """The path of the table that a header names; ``entries`` are the numbers of the last ones of lists."""
    path: KeyPath = ()
    value: Any = parsed
    while value:
        if path in entries:
            path = (*path, entries[path])
        ((key, value),) = value.items()
        path = (*path, key)
        if isinstance(value, list):
            entries[path] = entries.get(path, -1) + 1
            return (*path, entries[path])
    return path


def _paths(value: Any) -> Iterator[KeyPath]:
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in below:
        yield (key,)
        yield from ((key, *path) for path in _paths(inner))


#: By how Python's messages begin: what a person would write there.
_EXPECTED = {
    "Invalid value": 'a value is a "text" in quotation marks, a number, true, false, a [list] or a {table}',
    "Invalid statement": "a line is `key = value`, a [table], or a # comment",
    "Expected '=' after a key": "a line is `key = value`; a key with anything but letters, digits, _ and - "
    "needs quotation marks",
    "Expected newline or end of document": "one `key = value` a line; text needs quotation marks around all "
    "of it",
    "Invalid initial character for a key part": "a key of letters, digits, _ and -, before its =",
    "Unclosed array": "the list needs a comma between its values, and a ] at its end",
    "Unclosed inline table": "the table needs a comma between its keys, and a } at its end",
    "Unterminated string": "the text needs the same quotation marks at its end as at its beginning",
    "Expected ']' at the end of a table declaration": "a table is [name], alone on its line",
    "Expected ']]' at the end of an array declaration": "such a table is [[name]], alone on its line",
    "Illegal character": 'text ends on the line on which it begins; for several lines use """',
    "Unescaped '\\'": "in quotation marks a \\ is written \\\\; or use 'single ones'",
    "Cannot overwrite a value": "each key once a table",
    "Cannot declare": "each [table] once; several of a kind are [[table]]",
    "Duplicate inline table key": "each key once a table",
}
_AT = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")
#: after one of these a value is shown to nobody
_SECRET = re.compile(r"(?i)token|headers|secret|password")
MAX_SHOWN = 120


def syntax_problem(source: str, text: str, exc: tomllib.TOMLDecodeError) -> Problem:
    """The problem of ``text``, the content of ``source``, of which ``exc`` came."""
    words = str(exc)
    lines = text.splitlines() or [""]
    # at the end of the document it is the last line with something on it that is not complete
    line = next((number for number in range(len(lines), 0, -1) if lines[number - 1].strip()), 1)
    place = ", at its end"
    if (at := _AT.search(words)) is not None:
        words = words[: at.start()]
        if at[1] is not None:
            line, place = min(int(at[1]), len(lines)), f", column {at[2]}"
    wanted = next((told for begins, told in _EXPECTED.items() if words.startswith(begins)), "")
    message = f"it is not TOML{place}: {words} in `{_shown(lines[line - 1])}`"
    return Problem(key="", source=source, line=line, message=f"{message}; {wanted}" if wanted else message)


def _shown(line: str) -> str:
    key, equals, _ = line.strip().partition("=")
    if _SECRET.search(key):
        return f"{key.strip()} {equals} ...".strip()
    whole = line.strip()
    return whole if len(whole) <= MAX_SHOWN else f"{whole[:MAX_SHOWN]}..."
