"""Who may read the live page and the status: on a loopback address anybody on this machine, else who has the
token.

On a loopback address a request must name an address or ``localhost`` as its host: else a page of another
site, whose name its owner lets point here, could read it through the user's browser.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs

from starlette.types import Scope

from hypha.errors import ConfigError, Problem
from hypha.telemetry.http.hosts import names_address

_FILE = "page-token"
_TOKEN_BYTES = 32


@dataclass(frozen=True)
class Access:
    """``token`` is None on a loopback address, where none is asked for."""

    token: str | None = field(default=None, repr=False)

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """The status and the text of a refusal; None where the request is let in."""
        if self.token is None:
            host = _header(scope, b"host")
            if host is None or names_address(host):
                return None
            return 403, f"{host!r} is no address of this machine: open the page by 127.0.0.1 or localhost.\n"
        expected = self.token.encode()
        if any(hmac.compare_digest(given.encode(), expected) for given in _tokens(scope)):
            return None
        return 401, f"The token is missing or wrong: it is in {_FILE} in the job's state directory.\n"


def token_in(directory: Path) -> tuple[str, Path]:
    """The token that is kept in ``directory``, made when there is none, and its file, which nobody else may
    read. Blocks. Raises :class:`ConfigError` when it cannot be kept.
    """
    path = directory / _FILE
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            path.chmod(0o600)
            kept = path.read_text().strip()
            if kept:
                return kept, path
            handle = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        with os.fdopen(handle, "w") as file:
            file.write(token + "\n")
    except OSError as exc:
        text = f"it is no loopback address, and the page's token cannot be kept in {path}: {exc}"
        raise ConfigError([Problem("http_address", text)]) from exc
    return token, path


def _tokens(scope: Scope) -> Iterable[str]:
    header = _header(scope, b"authorization") or ""
    kind, _, value = header.partition(" ")
    if kind.lower() == "bearer":
        yield value.strip()
    query = scope["query_string"].decode("latin-1")
    try:
        yield from parse_qs(query, max_num_fields=10).get("token", [])
    except ValueError:
        return


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)
