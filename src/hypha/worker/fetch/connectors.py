"""Fetching what a job's references name, each kind behind its allow-list, into a directory of its own."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from hypha.beneath import relative_path
from hypha.disks import is_disk_full
from hypha.errors import NetworkError, PeerUnreachable, Refused, TransferFailed
from hypha.messages import (
    FileList,
    HuggingFace,
    ListFiles,
    Local,
    PeerRef,
    Peers,
    PullFile,
    Reference,
    Request,
    Response,
    TransferMeta,
    Uri,
)
from hypha.runtime import chance
from hypha.waiting import in_words, reminded
from hypha.worker.fetch.allowance import Allowance
from hypha.worker.fetch.downloads import fetch_hub, fetch_local, fetch_uri

logger = logging.getLogger("hypha.worker.fetch")


class Pull(Protocol):
    """As ``Transfers.pull``."""

    async def __call__(
        self,
        peer: PeerRef,
        request: PullFile,
        destination: Path,
        expect: TransferMeta | None,
        max_bytes: int,
        still_s: float | None = None,
    ) -> TransferMeta: ...


class Requester(Protocol):
    """As ``Node.request``."""

    async def __call__(self, peer: PeerRef, request: Request, timeout_s: float = ...) -> Response: ...


class Connectors:
    """``hub_endpoint``: another address of the Hugging Face hub than the environment's."""

    def __init__(
        self, allowance: Allowance, ask: Requester, pull: Pull, hub_endpoint: str | None = None
    ) -> None:
        self._allowance = allowance
        self._ask = ask
        self._pull = pull
        self._hub_endpoint = hub_endpoint

    async def fetch(self, reference: Reference, directory: Path, job_id: str) -> list[Path]:
        """All files of ``reference``, in the empty ``directory``.

        Raises Refused (asking again is of no use), PeerUnreachable, RequestTimeout, TransferFailed.
        """
        self._allowance.check(reference)
        try:
            return await self._fetch(reference, directory, job_id)
        except (OSError, TransferFailed) as exc:
            for cause in (exc, exc.__cause__):
                if cause is not None and is_disk_full(cause):
                    raise Refused("no-space", str(cause)) from exc
            raise

    async def _fetch(self, reference: Reference, directory: Path, job_id: str) -> list[Path]:
        limit = self._allowance.max_file_bytes
        match reference:
            case Uri(value=value):
                fetch = partial(fetch_uri, value, directory, self._allowance)
                return await _said(_without_secrets(value), directory, job_id, fetch)
            case HuggingFace(repository=repository):
                fetch = partial(fetch_hub, reference, directory, limit, self._hub_endpoint)
                return await _said(repository, directory, job_id, fetch)
            case Local(url=url):
                fetch = partial(fetch_local, url, directory, self._allowance)
                return await _said(_without_secrets(url), directory, job_id, fetch)
            case Peers():
                return await self._fetch_peers(reference, directory, job_id)
        raise Refused("invalid", f"{type(reference).__name__} cannot be fetched like this")

    async def _fetch_peers(self, reference: Peers, directory: Path, job_id: str) -> list[Path]:
        """The whole resource from one peer, the next one where a peer fails. Which peers are asked first
        is up to the strategy; files that are already here, by their hash, are not pulled again.
        """
        peers = list(reference.peers)
        if reference.strategy == "random":
            chance().shuffle(peers)
        if not peers:
            raise Refused("invalid", "no peer to fetch from")
        if not reference.resource:
            raise Refused("invalid", "fetching from peers needs the name of a resource")
        failure: NetworkError = PeerUnreachable(peers[0].peer, "not tried")
        have: dict[str, str] = {}
        for peer in peers:
            try:
                return await self._fetch_resource(peer, reference.resource, directory, job_id, have)
            except NetworkError as exc:
                failure = exc
                logger.warning(
                    "Fetching %s failed: %s",
                    reference.resource,
                    exc,
                    extra={"peer_id": peer.peer, "job_id": job_id},
                )
        raise failure

    async def _fetch_resource(
        self, peer: PeerRef, resource: str, directory: Path, job_id: str, have: dict[str, str]
    ) -> list[Path]:
        kind, _, name = resource.partition("/")
        answer = await self._ask(peer, ListFiles(kind=kind, name=name, job_id=job_id), timeout_s=30.0)
        if not isinstance(answer, FileList):
            raise Refused("malformed", f"expected a list of files, got {type(answer).__name__}", peer.peer)
        paths = []
        for meta in answer.files:
            if meta.size > self._allowance.max_file_bytes:
                raise Refused("too-large", f"{meta.name} has {meta.size} bytes", peer.peer)
            relative = meta.name.removeprefix(f"{name}/") if name else meta.name
            try:
                path = directory / relative_path(relative)
            except ValueError as exc:
                raise Refused("invalid", f"a file is called {meta.name!r}", peer.peer) from exc
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if have.get(relative) != meta.blake3:
                full = f"{name}/{relative}" if name else relative
                what = PullFile(kind=kind, name=full, job_id=job_id)
                await self._pull(peer, what, path, meta, self._allowance.max_file_bytes)
                have[relative] = meta.blake3
            path.chmod(0o600)
            paths.append(path)
        return paths


def _without_secrets(address: str) -> str:
    """What it leads to, without who signs in there, and with what."""
    parts = urlsplit(address)
    return f"{parts.hostname}{parts.path}" if parts.hostname else parts.path


async def _said(
    what: str, directory: Path, job_id: str, fetch: Callable[[], Awaitable[list[Path]]]
) -> list[Path]:
    """What ``fetch`` does; once a minute it is said how far that is."""

    def say(lasted_s: float) -> None:
        sizes = [path.stat().st_size for path in directory.rglob("*") if path.is_file()]
        logger.info(
            "Fetching %s goes on since %s: %.1f MB are here.",
            what,
            in_words(lasted_s),
            sum(sizes) / 1e6,
            extra={"job_id": job_id},
        )

    return await reminded(fetch, say)
