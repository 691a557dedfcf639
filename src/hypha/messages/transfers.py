"""Files on their way from one node to another."""

from __future__ import annotations

from typing import Literal

from hypha.messages.values import Addresses, Id, JobStamp, Message, Value


class PullFile(Message):
    """Which file is wanted. ``kind`` and ``name``: ``slice`` ``<dataset>/<index>``, ``model`` ``<file>``,
    ``checkpoint`` ``<round>/<file>``. ``token`` is not read: before 0.1.0 it was a request, and told one pull
    from another.
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
    #: not read: each block of a file says whether it is compressed
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
    """I will send this; what is offered again under the same ``token`` goes on. ``traceparent``: of which
    operation the transfer is part. ``addresses`` is not read.
    """

    token: Id
    meta: TransferMeta
    addresses: Addresses
    traceparent: str | None = None


class BulkAnswer(Message):
    """What answered an offer before 0.1.0, when that was a request; not sent any more."""

    offset: int
    addresses: Addresses
    done: bool = False
    wait_s: float = 0.0


class BulkDial(Message):
    """I cannot dial you: please dial me, name this token (``Hello``), and hear what I have to say."""

    token: Id
    addresses: Addresses
