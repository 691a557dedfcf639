"""Every error Hypha raises on purpose, one tree, drawn here.

HyphaError                      exit code 1
├── ConfigError                 exit code 2   a file, key or value the operator must change
│   ├── IdentityError                         a certificate, key, trust bundle or CRL
│   └── AddressTaken            exit code 75  an address to listen on is in use: that may pass
├── NetworkError
│   ├── PeerUnreachable                       no address, direct or relayed, answered
│   ├── RequestTimeout                        connected, but no answer in time
│   ├── Refused                               the peer said no, and why (code, reason)
│   └── TransferFailed                        a bulk transfer was cut; it may be resumed
│       └── TransferCorrupt                   it arrived whole, with another hash
├── DataError
│   ├── DatasetNotFound         exit code 3   nobody announces or serves the dataset
│   ├── DatasetMismatch                       two replicas of one name differ
│   ├── SliceCorrupt                          a slice file fails its hash or its format
│   ├── InputUnusable           exit code 2   what is to be prepared cannot be used as it is
│   ├── CheckpointUnusable                    a checkpoint is not there, or not what was saved
│   └── BatchFailed                           model and data do not go together
├── Undecodable                           what somebody else wrote is not what it should be
├── AllocationFailed            exit code 4   nobody offered what the job asked for
└── JobFailed                   exit code 5   the job cannot go on
    ├── ModelError                            the model cannot be loaded or built
    ├── NotFinite                             the loss or the weights are NaN or infinite
    ├── OutputError             exit code 6   the output place cannot be written
    └── ExecutorFailed                        a child process died

`hypha doctor` exits with 7 when it finds warnings at most, and with 8 when it finds errors in what it looks
at; errors of its own have the codes above.

Third-party exceptions are translated into these in the room that imports the third party, with
``from exc``. A message says what happened, to which peer, file or key, and what to do next.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Literal, TypeVar

E = TypeVar("E", bound=BaseException)


class HyphaError(Exception):
    """Root of the tree."""

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a configuration.

    ``key`` is the dotted path (``resources.memory``), ``source`` the file, variable or flag it came
    from, ``line`` its 1-based line in a file where known.
    """

    key: str
    message: str
    source: str = ""
    line: int | None = None

    def __str__(self) -> str:
        place = f"{self.source}:{self.line}" if self.line is not None else self.source
        return ": ".join(part for part in (place, self.key, self.message) if part)


class ConfigError(HyphaError):
    """All problems of a configuration at once; ``problems`` holds at least one."""

    exit_code = 2

    def __init__(self, problems: list[Problem] | str) -> None:
        if isinstance(problems, str):
            problems = [Problem(key="", message=problems)]
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class IdentityError(ConfigError):
    """A certificate, private key, trust bundle or CRL cannot be used."""


class AddressTaken(ConfigError):
    """Another program listens at an address of this node, or the address is not this machine's now: its
    network may not be up yet. Both may pass, so a service manager is to start the node again (75 is the
    ``EX_TEMPFAIL`` of sysexits.h).
    """

    exit_code = 75


def listening_failed(key: str, address: str, exc: OSError | None, advice: str = "") -> ConfigError:
    """What to raise where ``exc`` came of listening at ``address``, which ``key`` names."""
    reason = "" if exc is None else f": {os.strerror(exc.errno) if exc.errno else exc}"
    passes = exc is not None and exc.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL)
    kind = AddressTaken if passes else ConfigError
    return kind([Problem(key=key, message=f"cannot listen on {address}{reason}{advice}")])


class NetworkError(HyphaError):
    """Something between two nodes failed."""


class PeerUnreachable(NetworkError):
    """No known address of ``peer``, direct or relayed, could be reached. ``gone``: its machine itself says
    that nobody listens there any more, which a network failure never does.
    """

    def __init__(self, peer: str, reason: str, gone: bool = False) -> None:
        self.peer = peer
        self.reason = reason
        self.gone = gone
        super().__init__(f"peer {peer} is unreachable: {reason}")


class RequestTimeout(NetworkError):
    """``peer`` is connected but did not answer ``what`` within ``timeout_s`` seconds."""

    def __init__(self, peer: str, what: str, timeout_s: float) -> None:
        self.peer = peer
        super().__init__(f"peer {peer} did not answer {what} within {timeout_s:g} s")


class Refused(NetworkError):
    """``peer`` answered no. ``code`` is one of :data:`REFUSALS`, ``reason`` a sentence.

    ``retryable``: the same request may be repeated after a pause. ``final``: it would be refused each time.
    Between the two are refusals that last until somebody has changed something at the peer.
    """

    def __init__(self, code: str, reason: str, peer: str = "") -> None:
        self.code = code
        self.reason = reason
        self.peer = peer
        super().__init__(f"{peer or 'this node'} refused ({code}): {reason}")

    @property
    def retryable(self) -> bool:
        return retry_of(self.code) == "soon"

    @property
    def final(self) -> bool:
        return retry_of(self.code) == "never"


#: When a refused request may be repeated. ``soon``: after a pause, as what stands in its way passes by
#: itself. ``changed``: when something has changed at the peer; whoever has nothing else to do may wait for
#: that. ``never``: the same request is refused each time.
Retry = Literal["soon", "changed", "never"]


@dataclass(frozen=True)
class RefusalCode:
    """What a refusal code means, and when the request may be repeated."""

    meaning: str
    retry: Retry


#: Every refusal code on the wire. Whoever repeats requests asks this table (:attr:`Refused.retryable`,
#: :attr:`Refused.final`); where a code means something else at one place, a comment there says why.
REFUSALS = {
    "busy": RefusalCode("over a concurrency limit, or just starting", "soon"),
    "unreachable": RefusalCode("it could not connect to the caller", "soon"),
    "internal": RefusalCode("the peer failed; its log says more", "soon"),
    "no-space": RefusalCode("its disk is full", "changed"),
    "not-found": RefusalCode("no such job, dataset, slice or file here, or none yet", "changed"),
    "lease": RefusalCode("no such lease, or it belongs to somebody else, or it has expired", "changed"),
    "role": RefusalCode("the caller's certificate does not carry the role this needs", "changed"),
    "uninvited": RefusalCode("the sender takes no part in this job", "changed"),
    "not-allowed": RefusalCode("an allow-list of this node's owner forbids it", "changed"),
    "malformed": RefusalCode("the message does not decode; a version difference or a bug", "never"),
    "unsupported": RefusalCode("this component does not answer such requests", "never"),
    "stale": RefusalCode("an older generation or round; the sender must resynchronise", "never"),
    "duplicate": RefusalCode("already received; nothing to do", "never"),
    "too-large": RefusalCode("over a size limit", "never"),
    "invalid": RefusalCode("the content is wrong: shape, dtype, a value that is not finite", "never"),
}


def retry_of(code: str) -> Retry:
    """When a request that was refused with ``code`` may be repeated. A code of a later version, which is not
    known here, is neither repeated at once nor given up for good.
    """
    known = REFUSALS.get(code)
    return "changed" if known is None else known.retry


class TransferFailed(NetworkError):
    """A bulk transfer ended before its end; what arrived is kept for a resume, never used."""

    def __init__(self, peer: str, name: str, reason: str) -> None:
        self.peer = peer
        self.name = name
        self.reason = reason
        super().__init__(f"transfer of {name} with {peer} failed: {reason}")


class TransferCorrupt(TransferFailed):
    """All bytes arrived, but their BLAKE3 hash is not the promised one; they were deleted."""


class DataError(HyphaError):
    """A dataset, manifest or slice is wrong."""


class DatasetNotFound(DataError):
    """Nobody serves the dataset."""

    exit_code = 3


class DatasetMismatch(DataError):
    """Two nodes serve different data under one name."""


class SliceCorrupt(DataError):
    """A slice file fails its hash, or is no safetensors file, or differs from the manifest."""


class InputUnusable(DataError):
    """What a user wants to have prepared cannot be used as it is; the message says what to change."""

    exit_code = 2


class CheckpointUnusable(DataError):
    """The checkpoint to restore from is not there, not whole, or not what was saved."""


class BatchFailed(DataError):
    """A model cannot be trained on a batch: labels, types, tokens, columns. Any machine would
    say the same.
    """


class Undecodable(HyphaError):
    """Bytes or text that others wrote cannot be decoded; :mod:`hypha.decoding` raises it, and whoever calls
    that adds whose they are.
    """


class AllocationFailed(HyphaError):
    """Nobody offered what the job asked for within the time it was willing to wait."""

    exit_code = 4


class JobFailed(HyphaError):
    """The job cannot go on; everything up to the last checkpoint is kept."""

    exit_code = 5


class ModelError(JobFailed):
    """The model cannot be fetched, built or loaded."""


class NotFinite(JobFailed):
    """Training has diverged: the loss or the weights hold NaN or infinity."""


class OutputError(JobFailed):
    """The place for the trained model cannot be written."""

    exit_code = 6


class ExecutorFailed(JobFailed):
    """An executor process ended on its own."""


def leaves(group: BaseExceptionGroup[E]) -> list[E]:
    """The exceptions in ``group`` that are no groups themselves."""
    found: list[E] = []
    for exc in group.exceptions:
        found += leaves(exc) if isinstance(exc, BaseExceptionGroup) else [exc]
    return found
