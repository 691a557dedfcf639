"""A picture of the rooms of the source, drawn from its imports: who uses whom, row by row."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "hypha"
#: The rows of ARCHITECTURE.md, from top to bottom; modules that stand alone are drawn by their row's name.
ROWS: Mapping[str, tuple[str, ...]] = {
    "commands": ("cli",),
    "the same in memory": ("simulation",),
    "components": ("gateway", "scheduler", "worker", "data"),
    "what they stand on": ("net", "telemetry", "sinks", "pki"),
    "words that everybody shares": ("messages", "config", "tracing", "errors"),
    "a child process": ("executor",),
}


def uses() -> dict[str, frozenset[str]]:
    """Of each room that is drawn, those whose modules it imports."""
    drawn = {room for rooms in ROWS.values() for room in rooms}
    found: dict[str, set[str]] = {room: set() for room in drawn}
    for path in sorted(SOURCE.rglob("*.py")):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if room in drawn:
            found[room] |= {other for other in _imported(path) if other in drawn and other != room}
    return {room: frozenset(others) for room, others in found.items()}


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "hypha" and rest:
                yield rest.partition(".")[0]


def necessary(graph: Mapping[str, frozenset[str]]) -> list[tuple[str, str]]:
    """The edges of ``graph``, which has no circle, without those that follow from others."""

    def reached(room: str) -> set[str]:
        return {one for other in graph[room] for one in (other, *reached(other))}

    return [
        (room, other)
        for room in graph
        for other in sorted(graph[room])
        if not any(other in reached(third) for third in graph[room] - {other})
    ]


def picture() -> str:
    """A Mermaid flowchart: arrows point to what is used; what follows from other arrows is left out."""
    lines = ["```mermaid", "flowchart TD"]
    for row, rooms in ROWS.items():
        lines.append(f'    subgraph "{row}"')
        lines += [f'        {room}["{_label(room)}"]' for room in rooms]
        lines.append("    end")
    order = [room for rooms in ROWS.values() for room in rooms]
    graph = uses()
    arrows = necessary({room: graph[room] for room in order})
    return "\n".join([*lines, *(f"    {room} --> {other}" for room, other in arrows), "```"])


def _label(room: str) -> str:
    path = SOURCE / room
    inner = (
        sorted(one.name for one in path.iterdir() if (one / "__init__.py").exists()) if path.is_dir() else []
    )
    return f"<b>{room}</b><br>{' · '.join(inner)}" if inner else f"<b>{room}</b>"
