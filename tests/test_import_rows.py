"""The rows of ARCHITECTURE.md: imports point down only, and some libraries belong to one room."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "hypha"
ROWS = (
    {"cli"},
    {"simulation"},
    {"gateway", "scheduler", "worker", "data"},
    {"net", "telemetry", "pki", "sinks"},
    {
        "access",
        "backoff",
        "messages",
        "features",
        "config",
        "decoding",
        "errors",
        "files",
        "node",
        "processes",
        "rules",
        "runtime",
        "journal",
        "naming",
        "tracing",
        "waiting",
    },
)
#: Within a row, who may use whom.
SIDEWAYS = {
    ("net", "pki"),
    ("net", "telemetry"),
    ("backoff", "runtime"),
    ("config", "errors"),
    ("messages", "errors"),
    ("features", "messages"),
    ("access", "messages"),
    ("rules", "journal"),
    ("rules", "messages"),
    ("config", "messages"),
    ("node", "messages"),
    ("decoding", "errors"),
    ("config", "decoding"),
    ("runtime", "files"),
    ("journal", "files"),
}
#: Libraries that one room alone imports.
OWNERS = {
    "libp2p": "net",
    "torch": "executor",
    "transformers": "executor",
    "accelerate": "executor",
    "opentelemetry.sdk": "telemetry",
    "opentelemetry.exporter": "telemetry",
}
#: What pure machines have nothing to do with: waiting, input and output.
IMPURE = {
    "trio",
    "os",
    "io",
    "pathlib",
    "shutil",
    "socket",
    "sqlite3",
    "subprocess",
    "tempfile",
    "threading",
    "time",
}
PURE = sorted(
    [
        *(SOURCE / "scheduler" / "rounds").glob("*.py"),
        *(
            SOURCE / "scheduler" / "leasing" / f"{name}.py"
            for name in ("allocator", "bidding", "giving_way", "renewal", "events", "track_records")
        ),
    ]
)
FILES = sorted(SOURCE.rglob("*.py"))


#: Dotted name of a module or package -> its file.
MODULES = {
    ".".join(("hypha", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in FILES
}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def row_of(room: str) -> int:
    return 4 if room == "executor" else next(number for number, rooms in enumerate(ROWS) if room in rooms)


def allowed(room: str, other: str) -> bool:
    if other in (room, "__version__") or (room, other) in SIDEWAYS:
        return True
    if other == "executor":  # a child process: nobody imports it, but for a world whose executors are tasks
        return room == "simulation"
    return row_of(other) > row_of(room) or (room == "executor" and other in ROWS[4])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "hypha" and room != "__init__":
            assert allowed(room, parts[1]), f"{path}: {room} imports {name}"
        for library in (parts[0], ".".join(parts[:2])):
            owner = OWNERS.get(library, room)
            assert owner == room, f"{path}: only {owner}/ imports {library}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_only_config_reads_the_environment(path: Path) -> None:
    reads = {
        node.lineno
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"))
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and "environ" in str(ast.dump(node)))
    }
    assert not reads or room_of(path) == "config", (
        f"{path}:{min(reads, default=0)}: use hypha.config.environment"
    )


@pytest.mark.parametrize("path", PURE, ids=lambda path: str(path.relative_to(SOURCE)))
def test_machines_neither_wait_nor_do_input_or_output(path: Path) -> None:
    imported = {name.partition(".")[0] for name in imports_of(path)}
    assert not imported & IMPURE, f"{path} imports {sorted(imported & IMPURE)}: a loop does that"
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"open", "print", "input"}, f"{path} does input or output"


def test_every_room_is_on_the_map() -> None:
    rooms = {room_of(path) for path in FILES} - {"__init__"}
    assert rooms <= {"executor"}.union(*ROWS)


def modules_imported_by(path: Path) -> set[str]:
    """Modules of ours that it imports when it runs, in functions, too: what stands under TYPE_CHECKING is for
    two types that name each other, and is never executed.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return found & set(MODULES)


def circle_in(graph: Mapping[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as exc:
        return list(exc.args[1])
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Nor by an import within a function, which hides that two modules are one."""
    assert circle_in({name: modules_imported_by(path) - {name} for name, path in MODULES.items()}) == []


def test_the_rooms_of_data_stand_above_each_other() -> None:
    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        if name.startswith("hypha.data."):
            own = name.split(".")[2]
            others = {
                other.split(".")[2] for other in modules_imported_by(path) if other.startswith("hypha.data.")
            }
            graph[own] = graph.get(own, set()) | others - {own}
    assert circle_in(graph) == []
