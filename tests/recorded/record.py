"""Record what this version sends and leaves behind: ``python -m tests.recorded.record``.

It writes ``tests/recorded/versions/<version>/``, anew if it is there: do so before a version is released, and
leave the directories of released versions as they are, since nodes of those versions are about.
``messages.json`` holds each message encoded and, beside that, what it says; ``words.json`` all that a job can
ask for; ``states`` the files of nodes, and ``states.json`` what is in them. ``before-0.1.0`` is of the nodes
that stated no version.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tests.recorded.examples import kinds, plain, words
from tests.recorded.states import copied, read_states, write_states

from hypha import __version__

VERSIONS = Path(__file__).parent / "versions"


def record(into: Path) -> None:
    """Everything, into the directory ``into``, which is emptied before."""
    if into.exists():
        shutil.rmtree(into)
    into.mkdir(parents=True)
    _write_lines(into / "messages.json", recorded_messages())
    (into / "words.json").write_text(json.dumps(words(), indent=1) + "\n", encoding="utf-8")
    write_states(into / "states")
    with tempfile.TemporaryDirectory() as scratch:
        states = copied(into / "states", Path(scratch) / "states")
        found = {name: plain(value) for name, value in read_states(states)}
    _write_lines(into / "states.json", found)


def recorded_messages() -> dict[str, Any]:
    """By kind and variant: ``full`` with every field, ``least`` with none that may be left out."""
    return {
        f"{kind.name} ({variant})": {
            # text where a reader can read it
            "encoded": encoded.decode() if kind.encoding == "json" else base64.b64encode(encoded).decode(),
            "says": plain(kind.decode(encoded)),
        }
        for kind in kinds()
        for variant, encoded in (
            ("full", kind.encode(kind.example(False))),
            ("least", kind.encode(kind.example(True))),
        )
    }


def _write_lines(path: Path, content: dict[str, Any]) -> None:
    """One entry a line, so that a difference between two versions is one of lines."""
    lines = (
        f"{json.dumps(name)}:{json.dumps(content[name], separators=(',', ':'))}" for name in sorted(content)
    )
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default=__version__, help="of the version; default: the one installed")
    record(VERSIONS / parser.parse_args().name)


if __name__ == "__main__":
    main()
