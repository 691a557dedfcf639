"""Where something is wrong in a TOML file: on which line each key stands, and what is no TOML at all.

``tomllib`` does not say where keys are. What looks for them walks a text that tomllib has accepted, so it
need not check anything.
"""

from __future__ import annotations

import bisect
import re
import tomllib

from hypha.errors import Problem

KeyPath = tuple[str | int, ...]

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACES = re.compile(r"[ \t]*")
_SCALAR = re.compile(r"[^,\]}\n#]*")
_STRINGS = (
    re.compile(r'"""(?:\\.|[^\\])*?"{3,5}', re.DOTALL),
    re.compile(r"'''.*?'{3,5}", re.DOTALL),
    re.compile(r'"(?:\\.|[^"\\\n])*"'),
    re.compile(r"'[^'\n]*'"),
)


def key_lines(text: str) -> dict[KeyPath, int]:
    """1-based line of every key, table and array entry of a valid TOML ``text``, by path."""
    return _Walk(text).lines


class _Walk:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[KeyPath, int] = {}
        self.array_tables: dict[KeyPath, int] = {}
        self._starts = [0, *(match.end() for match in re.finditer("\n", text))]
        table: KeyPath = ()
        self._skip(_BLANK)
        while self.at < len(text):
            if text[self.at] == "[":
                table = self._header()
            else:
                self._pair(table)
            self._skip(_BLANK)

    def _line(self) -> int:
        return bisect.bisect_right(self._starts, self.at)

    def _skip(self, pattern: re.Pattern[str]) -> None:
        if (match := pattern.match(self.text, self.at)) is not None:
            self.at = match.end()

    def _note(self, path: KeyPath, line: int) -> None:
        self.lines.setdefault(path, line)

    def _header(self) -> KeyPath:
        line = self._line()
        brackets = 2 if self.text.startswith("[[", self.at) else 1
        self.at += brackets
        *parents, last = self._keys()
        self.at += brackets
        path: KeyPath = ()
        for key in parents:
            path = (*path, key)
            self._note(path, line)
            if path in self.array_tables:
                path = (*path, self.array_tables[path])
        path = (*path, last)
        self._note(path, line)
        if brackets == 2:
            self.array_tables[path] = self.array_tables.get(path, -1) + 1
            path = (*path, self.array_tables[path])
            self._note(path, line)
        return path

    def _keys(self) -> list[str]:
        keys = []
        while True:
            self._skip(_SPACES)
            keys.append(self._key())
            self._skip(_SPACES)
            if self.text[self.at : self.at + 1] != ".":
                return keys
            self.at += 1

    def _key(self) -> str:
        quote = self.text[self.at]
        if quote in "\"'":
            start = self.at
            self._string()
            return next(iter(tomllib.loads(f"{self.text[start : self.at]} = 0")))
        match = _BARE_KEY.match(self.text, self.at)
        if match is None:
            raise ValueError(f"not valid TOML at character {self.at}")
        self.at = match.end()
        return match.group()

    def _pair(self, table: KeyPath) -> None:
        line = self._line()
        keys = self._keys()
        for count in range(1, len(keys) + 1):
            self._note((*table, *keys[:count]), line)
        self.at += 1
        self._skip(_SPACES)
        self._value((*table, *keys))

    def _value(self, path: KeyPath) -> None:
        first = self.text[self.at]
        if first in "\"'":
            self._string()
        elif first in "[{":
            self._entries(path, "]" if first == "[" else "}")
        else:
            self._skip(_SCALAR)

    def _string(self) -> None:
        for pattern in _STRINGS:
            if (match := pattern.match(self.text, self.at)) is not None:
                self.at = match.end()
                return
        raise ValueError(f"not valid TOML at character {self.at}")

    def _entries(self, path: KeyPath, end: str) -> None:
        """Those of an array, up to its ``]``, or of an inline table, up to its ``}``."""
        self.at += 1
        index = 0
        self._skip(_BLANK)
        while self.text[self.at] != end:
            if end == "}":
                self._pair(path)
            else:
                self._note((*path, index), self._line())
                self._value((*path, index))
                index += 1
            self._skip(_BLANK)
            if self.text[self.at] == ",":
                self.at += 1
                self._skip(_BLANK)
        self.at += 1


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
