"""Finding who serves the dataset, and making sure that all of them serve the same one.

A DHT answer is a hint: every provider is asked for its manifest, whose hash is computed here again. Those
whose manifest has the same hash are interchangeable; one that differs is refused, loudly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec
import trio

from hypha.access import SERVICES, carries, may_act_as
from hypha.backoff import NO_JITTER, Backoff
from hypha.config.job import DatasetRef
from hypha.errors import DatasetMismatch, DatasetNotFound, NetworkError, PeerUnreachable, Refused
from hypha.features import Abilities, stated
from hypha.messages import DatasetDescription, DescribeDataset, Manifest, PeerRef
from hypha.naming import shown
from hypha.node import Node, PeerLost
from hypha.rules.manifests import manifest_problem
from hypha.runtime import in_thread

logger = logging.getLogger(__name__)

_ASK_TIMEOUT_S = 5.0
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0
#: how often further providers are looked for, and known ones asked whether they are still there
REFRESH_S = 15.0
#: a provider that did not answer so often in a row is not named any more
_PATIENCE = 2
#: for so long the data that the ledger names is waited for, or a decision between two that as many serve
_UNDECIDED_S = 10.0
#: until the next look, while somebody is missed
_MISSED_PAUSE_S = 1.0


def why_not_used(wanted: DatasetRef, node: Node, peer: str) -> str | None:
    """In words, of ``peer``, which is or was connected; a job may name its data nodes, by the organisations
    that vouch for them, or by PeerID. PeerUnreachable when it was not.
    """
    has = node.roles_of(peer)
    if not may_act_as(has, SERVICES["dataset"].by):
        # with other data under the name it would stop every job
        return f"is no data node: its certificate has {carries(has)}"
    if not (wanted.organizations or wanted.data_nodes) or peer in wanted.data_nodes:
        return None
    organization = node.organization_of(peer)
    if organization in wanted.organizations:
        return None
    if not wanted.organizations:
        return "is not among scheduler.job.dataset.data_nodes"
    return f"is of {organization!r}, which scheduler.job.dataset.organizations does not name"


class ServedDataset:
    """A dataset and who serves it now. ``providers`` may become empty, and fill again."""

    def __init__(self, wanted: DatasetRef, description: DatasetDescription, providers: list[PeerRef]) -> None:
        self.name = wanted.dataset
        self._wanted = wanted
        self.manifest: Manifest = description.manifest
        self.manifest_hash = description.manifest_hash
        self.providers: dict[str, PeerRef] = {ref.peer: ref for ref in providers}
        #: what each states of its version
        self.stated: dict[str, Abilities] = {}
        self._silent: dict[str, int] = {}
        self._refused: set[str] = set()
        self._missed = trio.Event()

    def providers_for(self, index: int) -> tuple[PeerRef, ...]:
        """All providers, each slice beginning with another one, so that the load is spread."""
        refs = [self.providers[peer] for peer in sorted(self.providers)]
        first = index % len(refs) if refs else 0
        return tuple(refs[first:] + refs[:first])

    def refuse(self, peer: str, other_hash: str) -> None:
        """That node serves other data under the name; that is logged once."""
        if peer not in self._refused:
            logger.error(
                "A data node serves different data under the name %s (manifest %s, not %s); it is not used",
                self.name,
                other_hash[:16],
                self.manifest_hash[:16],
                extra={"peer_id": peer},
            )
        self._refused.add(peer)

    async def watch(self, node: Node) -> None:
        """Keep ``providers`` true until cancelled. A lost one is asked at once whether it still serves."""
        pauses = Backoff(_MISSED_PAUSE_S, REFRESH_S, jitter=NO_JITTER)
        pause_s = pauses.next_s()
        async with node.watch_peers() as lost, trio.open_nursery() as nursery:
            nursery.start_soon(self._listen, lost)
            while True:
                missed = not self.providers or bool(self._silent)
                with trio.move_on_after(_MISSED_PAUSE_S if missed else pause_s):
                    await self._missed.wait()
                self._missed = trio.Event()
                await self.refresh(node)
                pause_s = pauses.next_s()

    async def _listen(self, lost: trio.MemoryReceiveChannel[PeerLost]) -> None:
        async for event in lost:
            if event.peer in self.providers:
                self._missed.set()

    async def refresh(self, node: Node) -> None:
        known = self.providers | {ref.peer: ref for ref in await _announced(node, self.name)}
        answers, gone = await _describe(node, self._wanted, known.values(), self._refused)
        self._silent = {peer: count for peer, count in self._silent.items() if peer in self.providers}
        for peer, ref in known.items():
            answer = answers.get(peer)
            if answer is None:
                if peer not in self.providers:
                    continue
                self._silent[peer] = self._silent.get(peer, 0) + 1
                if peer in gone or self._silent[peer] >= _PATIENCE:
                    del self.providers[peer], self._silent[peer]
                    logger.warning("A data node does not answer any more", extra={"peer_id": peer})
                continue
            self._silent.pop(peer, None)
            if answer.manifest_hash != self.manifest_hash:
                self.providers.pop(peer, None)
                self.refuse(peer, answer.manifest_hash)
                continue
            self._refused.discard(peer)
            if peer not in self.providers:
                logger.info("Another data node serves %s", self.name, extra={"peer_id": peer})
            self.providers[peer] = ref
            self.stated[peer] = stated(answer)
        self.stated = {peer: one for peer, one in self.stated.items() if peer in self.providers}


async def find_dataset(
    node: Node,
    wanted: DatasetRef,
    report: Callable[[str], None] = lambda why: None,
    known: str | None = None,
) -> ServedDataset:
    """Wait until somebody whom the job allows serves what is ``wanted``, at most ``wanted.wait_s``;
    ``report`` is called with why it is not there yet.

    Where replicas differ, the one that is pinned is used, else the one ``known`` from the job's ledger, by
    the hashes of their manifests; else what most data nodes serve, and the others are named in the log. Where
    as many serve one as another for a while, what data nodes of this node's own organisation serve is used,
    else the one whose hash is the smallest: nobody who serves other data under a name is to stop a job, and
    it is the same one each time. Raises :class:`DatasetNotFound`, or :class:`DatasetMismatch` when only other
    data than the pinned one is served.
    """
    name, wait_s = wanted.dataset, wanted.wait_s
    backoff, said = Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S, 1.5, NO_JITTER), False
    refused: set[str] = set()
    silent: list[PeerRef] = []
    # the last moment is too late to decide
    undecided_s = _UNDECIDED_S if wait_s is None else min(_UNDECIDED_S, wait_s / 2)
    choice = _Choice(wanted, known, node, undecided_s)
    with trio.move_on_after(float("inf") if wait_s is None else wait_s):
        while True:
            refs = await _announced(node, name)
            answers, _ = await _describe(node, wanted, refs, refused)
            silent = [ref for ref in refs if ref.peer not in answers and ref.peer not in refused]
            if answers:
                # one more look: the nearest peers of the DHT may not all know of all replicas
                await trio.sleep(_FIRST_PAUSE_S)
                more = [ref for ref in await _announced(node, name) if ref.peer not in answers]
                answers |= (await _describe(node, wanted, more, refused))[0]
                refs = [*refs, *more]
                dataset = choice.of(answers, {ref.peer: ref for ref in refs}, trio.current_time())
                if dataset is not None:
                    return dataset
            report(choice.open_because or _why_not(silent, refused))
            if not said:
                said = True
                logger.info(
                    "Nobody serves the dataset %s yet; waiting for a data node%s",
                    name,
                    f" ({choice.open_because})" if choice.open_because else "",
                )
            await trio.sleep(backoff.next_s())
    if choice.open_because:
        raise DatasetMismatch(f"within {wait_s:g} s {choice.open_because}")
    raise DatasetNotFound(
        f"nobody served the dataset {name} within {wait_s:g} s; {_why_not(silent, refused)}"
    )


def _why_not(silent: list[PeerRef], refused: set[str]) -> str:
    if not silent and refused:
        names = ", ".join(shown(peer) for peer in sorted(refused))
        return f"{len(refused)} node(s) announce it that this job does not use (the log says why): {names}"
    if not silent:
        return "no data node announces it: is the name right, and does its data node reach the same gateway?"
    names = ", ".join(shown(ref.peer) for ref in silent)
    return f"{len(silent)} data node(s) announce it but do not answer: {names}"


@dataclass
class _Choice:
    """Among data that differs under one name: which is used. ``node`` asks for it; for ``undecided_s`` it is
    waited for what would decide. ``open_because``: why nothing is used though something is served.
    """

    wanted: DatasetRef
    known: str | None
    node: Node
    undecided_s: float
    since: float | None = None
    open_because: str = ""

    def of(
        self, answers: dict[str, DatasetDescription], refs: dict[str, PeerRef], now: float
    ) -> ServedDataset | None:
        """What is used of ``answers``, which were given at ``now``; None: look again."""
        by_hash: dict[str, list[str]] = {}
        for peer, answer in sorted(answers.items()):
            by_hash.setdefault(answer.manifest_hash, []).append(peer)
        self.since = now if self.since is None else self.since
        waited = now >= self.since + self.undecided_s
        chosen = self._chosen(by_hash, waited)
        if chosen is None:
            return None
        self.open_because = ""
        providers = [refs[peer] for peer in by_hash[chosen]]
        described = _agreed(self.wanted.dataset, {peer: answers[peer] for peer in by_hash[chosen]})
        dataset = ServedDataset(self.wanted, described, providers)
        dataset.stated = {peer: stated(answers[peer]) for peer in by_hash[chosen]}
        for peer, answer in sorted(answers.items()):
            if answer.manifest_hash != chosen:
                dataset.refuse(peer, answer.manifest_hash)
        return dataset

    def _chosen(self, by_hash: dict[str, list[str]], waited: bool) -> str | None:
        groups = "; ".join(
            f"manifest {value} at {', '.join(shown(peer) for peer in peers)}"
            for value, peers in sorted(by_hash.items())
        )
        name, pinned, known = self.wanted.dataset, self.wanted.manifest_hash, self.known
        if pinned is not None:
            if pinned in by_hash:
                return pinned
            self.open_because = f"nobody serves {name} with the manifest {pinned} of the job; {groups}"
            return None
        if known in by_hash:
            return known
        if known is not None and not waited:
            self.open_because = f"nobody serves {name} as this job has trained on it so far; {groups}"
            return None
        most = max(len(peers) for peers in by_hash.values())
        first, *others = sorted(value for value, peers in by_hash.items() if len(peers) == most)
        if not others:
            return first
        self.open_because = f"data nodes serve different data under the name {name}: {groups}"
        if not waited:
            return None
        ours = [value for value in (first, *others) if self._is_ours(by_hash[value])]
        chosen, why = first, ""
        if len(ours) == 1:
            chosen, why = ours[0], ", as it is of this scheduler's own organisation"
        logger.error(
            "As many %s. The manifest %s is used%s. If another one is meant, stop the job and set "
            "dataset.manifest_hash to it, give one of them another name, or make their directories equal",
            self.open_because,
            chosen,
            why,
        )
        return chosen

    def _is_ours(self, peers: list[str]) -> bool:
        own = self.node.organization
        return bool(own) and any(self.node.organization_of(peer) == own for peer in peers)


def _agreed(name: str, answers: dict[str, DatasetDescription]) -> DatasetDescription:
    """What data nodes state of the same data. The hash does not cover the ranges of its columns, by which a
    job is refused before it begins: where they differ, some are wrong, and none is used.
    """
    described = next(iter(answers.values()))
    stating = {peer: one for peer, one in answers.items() if one.manifest.ranges}
    stated = {msgspec.json.encode(one.manifest.ranges): one for one in stating.values()}
    if len(stated) < 2:
        return next(iter(stated.values()), described)
    logger.warning(
        "Data nodes state different ranges of numbers for the columns of %s, so they are not checked: %s",
        name,
        ", ".join(map(shown, stating)),
    )
    manifest = msgspec.structs.replace(described.manifest, ranges=())
    return msgspec.structs.replace(described, manifest=manifest)


async def _announced(node: Node, name: str) -> list[PeerRef]:
    try:
        return await node.find_providers(name)
    except NetworkError as exc:
        logger.debug("Looking for providers of %s failed: %s", name, exc)
        return []


async def _describe(
    node: Node, wanted: DatasetRef, refs: Iterable[PeerRef], refused: set[str]
) -> tuple[dict[str, DatasetDescription], set[str]]:
    """What each states of the dataset, and on whose machine nobody listens any more. Who is no data node, or
    none that the job uses, is added to ``refused``, and logged once.
    """
    name, answers = wanted.dataset, dict[str, DatasetDescription]()
    gone: set[str] = set()

    def refuse(peer: str, level: int, text: str, *details: object) -> None:
        if peer not in refused:
            logger.log(level, text, *details, extra={"peer_id": peer})
        refused.add(peer)

    async def ask(ref: PeerRef) -> None:
        try:
            answer = await node.request(ref, DescribeDataset(dataset=name), timeout_s=_ASK_TIMEOUT_S)
        except NetworkError as exc:
            # not about asking again: these refuse whoever asks, and the job is not to wait for them
            if isinstance(exc, Refused) and exc.code in ("role", "not-allowed"):
                text = "%s serves %s, but not to this job: %s"
                refuse(ref.peer, logging.WARNING, text, shown(ref.peer), name, exc.reason)
            logger.debug("Provider %s did not describe %s: %s", ref.peer, name, exc)
            if isinstance(exc, PeerUnreachable) and exc.gone:
                gone.add(ref.peer)
            return
        if (problem := why_not_used(wanted, node, ref.peer)) is not None:
            text = "%s announces %s and %s; it is not used"
            refuse(ref.peer, logging.WARNING, text, shown(ref.peer), name, problem)
        elif isinstance(answer, DatasetDescription):
            problem = await in_thread(manifest_problem, answer.manifest, answer.manifest_hash)
            if not problem:
                answers[ref.peer] = answer
                return
            text = "A data node does not serve %s as it states: %s; it is not used"
            refuse(ref.peer, logging.ERROR, text, name, problem)

    async with trio.open_nursery() as nursery:
        for ref in refs:
            nursery.start_soon(ask, ref)
    return answers, gone
