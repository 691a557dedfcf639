"""Runs prepare on real files and reads back what it made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.data.reading import Array, read_dataset

from hypha.data import Prepared, PrepareOptions, prepare, verify
from hypha.errors import ConfigError, InputUnusable


def run(tmp_path: Path, *sources: Path, **changes: Any) -> tuple[Prepared, dict[str, Array]]:
    """The dataset made of ``sources``, in their order."""
    changes = {"output": tmp_path / "out", "shuffle": False, "slice_samples": 7, "force": True, **changes}
    done = prepare(PrepareOptions(sources=sources, **changes))
    assert verify(tmp_path / "out") == []
    return done, read_dataset(tmp_path / "out")


def refused(tmp_path: Path, *sources: Path, **changes: Any) -> str:
    """What the user reads, who is told so with exit code 2."""
    options = PrepareOptions(sources=sources, output=tmp_path / "refused", **changes)
    with pytest.raises((InputUnusable, ConfigError)) as caught:
        prepare(options)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "refused").exists()
    return str(caught.value)


def told(done: Prepared, words: str) -> str:
    """The only note with these words."""
    found = [note for note in done.notes if words in note]
    assert len(found) == 1, done.notes
    return found[0]
