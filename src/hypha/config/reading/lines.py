"""On which line of a TOML file each key stands, so that a problem can be told with file and line.

``tomllib`` does not say. This walks a text that tomllib has accepted, so it need not check anything.
"""

from __future__ import annotations

import re
import tomllib

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
        low, high = 0, len(self._starts)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._starts[middle] <= self.at else (low, middle)
        return low + 1

    def _skip(self, pattern: re.Pattern[str]) -> None:
        if (match := pattern.match(self.text, self.at)) is not None:
            self.at = match.end()

    def _note(self, path: KeyPath) -> None:
        self.lines.setdefault(path, self._line())

    def _header(self) -> KeyPath:
        double = self.text.startswith("[[", self.at)
        line_at = self.at
        self.at += 2 if double else 1
        keys = self._keys()
        self.at += 2 if double else 1
        path: KeyPath = ()
        end, self.at = self.at, line_at
        for key in keys[:-1]:
            self._note((*path, key))
            path = self._into((*path, key))
        path = (*path, keys[-1])
        self._note(path)
        if double:
            self.array_tables[path] = self.array_tables.get(path, -1) + 1
            path = (*path, self.array_tables[path])
            self._note(path)
        self.at = end
        return path

    def _into(self, path: KeyPath) -> KeyPath:
        return (*path, self.array_tables[path]) if path in self.array_tables else path

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
        start = self.at
        keys = self._keys()
        end, self.at = self.at, start
        for count in range(1, len(keys) + 1):
            self._note((*table, *keys[:count]))
        self.at = end + 1
        self._skip(_SPACES)
        self._value((*table, *keys))

    def _value(self, path: KeyPath) -> None:
        first = self.text[self.at]
        if first in "\"'":
            self._string()
        elif first == "[":
            self._array(path)
        elif first == "{":
            self._inline_table(path)
        else:
            self._skip(_SCALAR)

    def _string(self) -> None:
        for pattern in _STRINGS:
            if (match := pattern.match(self.text, self.at)) is not None:
                self.at = match.end()
                return
        raise ValueError(f"not valid TOML at character {self.at}")

    def _array(self, path: KeyPath) -> None:
        self.at += 1
        index = 0
        self._skip(_BLANK)
        while self.text[self.at] != "]":
            self._note((*path, index))
            self._value((*path, index))
            index += 1
            self._skip(_BLANK)
            if self.text[self.at] == ",":
                self.at += 1
                self._skip(_BLANK)
        self.at += 1

    def _inline_table(self, path: KeyPath) -> None:
        self.at += 1
        self._skip(_BLANK)
        while self.text[self.at] != "}":
            self._pair(path)
            self._skip(_BLANK)
            if self.text[self.at] == ",":
                self.at += 1
                self._skip(_BLANK)
        self.at += 1
