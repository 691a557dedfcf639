"""Files on their way from one node to another."""

from __future__ import annotations

from typing import Literal

from hypha.messages.values import Addresses, Id, JobStamp, Message, Value


class PullFile(Message):
    """A bulk transfer the other way round: please offer me that file. ``kind`` and ``name``:
    ``slice`` ``<dataset>/<index>``, ``model`` ``<file>``, ``checkpoint`` ``<round>/<file>``. Answered by
    the offer that is about to come under ``token`` (set by the bulk plane); the same token asks again how
    that goes.
    """

    kind: str
    name: str
    job_id: str | None = None
    token: Id = ""


class ListFiles(Message):
    """Which files has a directory-like resource (``model``, ``checkpoint/<round>``)?"""

    kind: str
    name: str = ""
    job_id: str | None = None


#: Files that come over TLS from whom they are of and go no further: they are checked for damage only.
QUICK_KINDS = frozenset({"update", "theta"})


class TransferMeta(Value):
    """What a bulk transfer carries. Hashes are hex, over the plain bytes.

    ``blake3`` says what a file is, wherever it comes from; an update needs none. What is of ``QUICK_KINDS``
    is checked by ``xxh3`` (XXH3, 128 bits), which takes a tenth of the processor's time or less.
    """

    kind: str
    name: str
    size: int
    blake3: str = ""
    stamp: JobStamp | None = None
    samples: int = 0
    #: with theta: the workers whose updates are in it
    contributors: tuple[str, ...] = ()
    encoding: Literal["none", "zstd"] = "none"
    xxh3: str = ""

    @property
    def checked(self) -> str:
        """The hash that the receiver checks."""
        return self.xxh3 if self.kind in QUICK_KINDS else self.blake3


class FileList(Message):
    """Name, size and hash of each file of a resource."""

    files: tuple[TransferMeta, ...]


class BulkOffer(Message):
    """I will send this. ``addresses``: where you may dial me for it. ``traceparent``: of which operation the
    transfer is part; over a connection that was kept an offer has no envelope that could say so.
    ``zstd_blocks``: I would compress single blocks, and say of each whether it is.
    """

    token: Id
    meta: TransferMeta
    addresses: Addresses
    traceparent: str | None = None
    zstd_blocks: bool = False


class BulkAnswer(Message):
    """``done`` when it is all here already. ``addresses``: dial me there. ``offset`` is not
    read by this version: the receiver says on the connection from where on to send.
    """

    offset: int
    addresses: Addresses
    done: bool = False
    #: not 0: others are served first; offer again, with the same token, after this long
    wait_s: float = 0.0


class BulkDial(Message):
    """My dial failed: please dial me for the transfer with this token."""

    token: Id
    addresses: Addresses
