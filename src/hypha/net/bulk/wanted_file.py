"""One pull: what it is willing to take, and how it ended."""

from __future__ import annotations

import logging
from pathlib import Path

import trio

from hypha.errors import (
    NetworkError,
    Refused,
    TransferCorrupt,
    TransferFailed,
)
from hypha.messages import PeerRef, PullFile, TransferMeta
from hypha.net.bulk.connection import BulkConnection
from hypha.net.bulk.files import DiskFailed, WrongHash
from hypha.net.bulk.inbound import Acceptor, Inbound
from hypha.net.bulk.rendezvous import Expected
from hypha.net.bulk.sending import new_token

logger = logging.getLogger(__name__)


class WantedFile(Acceptor):
    """One pull: what it is willing to take, and how it ended."""

    def __init__(
        self,
        peer: PeerRef | str,
        request: PullFile,
        destination: Path,
        expect: TransferMeta | None,
        max_bytes: int,
    ) -> None:
        super().__init__(self._gate, self._arrived, max_bytes)
        self.peer = peer
        self.peer_id = peer.peer if isinstance(peer, PeerRef) else peer
        self.token = new_token()
        self.request = request
        self.destination = destination
        self.expect = expect
        self.over = trio.Event()
        self.error: NetworkError | None = None
        #: what the provider said of the file
        self.meta: TransferMeta | None = None
        #: the provider has answered with the file
        self.agreed = False
        #: what lay here was a part of something else
        self.afresh = False
        #: what was here already when the last attempt began
        self.offset = 0
        #: by which way it came
        self.came_by = ""

    @property
    def log_fields(self) -> dict[str, str]:
        """Of whom, for the log."""
        return {"peer_id": self.peer_id}

    def begin(self) -> Inbound:
        """An attempt over a connection of ours, for which nothing need be offered."""
        meta = self.expect or TransferMeta(kind=self.request.kind, name=self.request.name, size=0)
        expected = Expected(self.peer_id)
        expected.close()
        return Inbound(
            token=self.token,
            caller=self.peer_id,
            meta=meta,
            acceptor=self,
            destination=self.destination,
            expected=expected,
            offered_at=trio.current_time(),
            started_afresh=self.afresh,
            pulled=True,
        )

    def result(self) -> TransferMeta:
        """What the provider said of the file, which is here; else raises why it is not."""
        self.raise_if_failed()
        if self.meta is None:
            raise TransferFailed(self.peer_id, self.request.name, "it ended without a result")
        return self.meta

    def raise_if_failed(self) -> None:
        """Raise why it will not come, where that is certain."""
        if self.error is not None:
            raise self.error

    def check(self, meta: TransferMeta) -> None:
        """Refused or TransferCorrupt when that is not what was asked for."""
        name = self.request.name
        if meta.size > self.limit:
            raise Refused(
                "too-large", f"{name} has {meta.size} bytes, over the limit of {self.limit}", self.peer_id
            )
        expect = self.expect
        if meta.kind != self.request.kind:
            # the kind decides how what arrives is checked and kept
            raise TransferCorrupt(self.peer_id, name, f"it offers a file of the kind {meta.kind!r}")
        if expect is not None and (meta.size, meta.blake3) != (expect.size, expect.blake3):
            raise TransferCorrupt(self.peer_id, name, "it offers other content than was promised")
        self.meta = meta

    def came_over(self, link: BulkConnection) -> None:
        self.came_by = link.way

    def failed(self, reason: Refused | WrongHash | DiskFailed) -> None:
        if isinstance(reason, WrongHash):
            self._end(TransferCorrupt(self.peer_id, self.request.name, str(reason)))
        else:
            self._end(TransferFailed(self.peer_id, self.request.name, str(reason)))

    async def _gate(self, caller: str, meta: TransferMeta) -> Path:
        try:
            self.check(meta)
        except NetworkError as exc:
            self._end(exc)
            raise Refused("invalid", "that is not what was asked for") from exc
        return self.destination

    async def _arrived(self, caller: str, meta: TransferMeta, path: Path) -> None:
        self._end(None)

    def _end(self, error: NetworkError | None) -> None:
        if not self.over.is_set():
            self.error = error
            self.over.set()
