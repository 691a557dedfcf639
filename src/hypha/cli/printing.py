"""What commands print, and write where they are told to: tables, JSON, text that peers may have written."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hypha.errors import OutputError
from hypha.files.staging import write_output
from hypha.naming import legible


def shown(text: str, style: str = "") -> Text:
    """``text`` as it is, though a peer may have written it: no markup, nothing that controls a terminal."""
    return Text(legible(text), style=style)


def print_line(console: Console, text: str) -> None:
    """At once, and as it is."""
    console.print(shown(text), highlight=False, soft_wrap=True)
    console.file.flush()


def table_of(*left: str, right: Iterable[str] = ()) -> Table:
    """An empty one; the columns ``right`` come last, and their cells are aligned to the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", overflow="fold")
    return table


def add_row(table: Table, *cells: str) -> None:
    """What peers have written is shown as it is."""
    table.add_row(*(shown(cell) for cell in cells))


def print_table(table: Table) -> None:
    if table.row_count:
        Console(width=None if sys.stdout.isatty() else 240, highlight=False).print(table)


def print_json(value: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(value, order="deterministic"), indent=2).decode())


def write_text(path: Path, text: str) -> None:
    """Write a file that somebody has asked for. Raises OutputError."""
    try:
        write_output(path, text)
    except OSError as exc:
        raise OutputError(f"{path} cannot be written: {exc.strerror}") from exc
