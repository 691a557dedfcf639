"""Putting key material on disk: never readable by others for a moment, never over something, never half."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from hypha.errors import IdentityError
from hypha.files.staging import StagedFile


def check_absent(paths: Sequence[Path], advice: str) -> None:
    """IdentityError when any of ``paths`` exists."""
    if there := [str(path) for path in paths if os.path.lexists(path)]:
        raise IdentityError(f"{', '.join(there)}: already there, and nothing is overwritten; {advice}")


def write_new(files: Sequence[tuple[Path, bytes, int]]) -> None:
    """Write ``(path, content, mode)`` each under its final name, or none of them."""
    made: list[Path] = []
    try:
        for path, content, mode in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            _place(path, content, mode)
            made.append(path)
    except OSError as exc:
        for path in made:
            path.unlink(missing_ok=True)
        what = (
            "already there" if isinstance(exc, FileExistsError) else f"it cannot be written ({exc.strerror})"
        )
        raise IdentityError(f"{exc.filename2 or exc.filename or files[0][0]}: {what}") from exc


def replace_file(path: Path, content: bytes, mode: int) -> None:
    """Atomically replace ``path``, whose owner and mode stay as they are, or make it with ``mode``."""
    try:
        try:
            before = path.stat()
        except FileNotFoundError:
            before = None
        _place(path, content, mode if before is None else stat.S_IMODE(before.st_mode), before)
    except OSError as exc:
        raise IdentityError(f"{path}: it cannot be written ({exc.strerror})") from exc


def _place(path: Path, content: bytes, mode: int, over: os.stat_result | None = None) -> None:
    """``over`` is the file that is replaced; without one nothing may be there."""
    with StagedFile(path, durable=True, mode=mode, exclusive=over is None) as staged:
        staged.file.write(content)
        if over is not None and (over.st_uid, over.st_gid) != (os.geteuid(), os.getegid()):
            # a node that runs as somebody else has to read it again; raises where we may not
            os.fchown(staged.file.fileno(), over.st_uid, over.st_gid)
        staged.publish()
