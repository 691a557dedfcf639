"""What is written in ``src``, for tests that read it."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "hypha"
FILES = sorted(SOURCE.rglob("*.py"))


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file, for whoever does not change it."""
    return ast.parse(path.read_text(encoding="utf-8"))
