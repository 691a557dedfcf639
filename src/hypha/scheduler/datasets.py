"""Finding who serves the dataset, and making sure that all of them serve the same one.

A DHT answer is a hint: every provider is asked for its manifest. Those whose manifest has the same hash
are interchangeable; one that differs is refused, loudly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from hypha.errors import DatasetMismatch, DatasetNotFound, NetworkError, PeerUnreachable
from hypha.messages import DatasetDescription, DescribeDataset, Manifest, PeerRef
from hypha.naming import shown
from hypha.node import Node, PeerLost

logger = logging.getLogger(__name__)

_ASK_TIMEOUT_S = 5.0
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0
#: how often further providers are looked for, and known ones asked whether they are still there
REFRESH_S = 15.0
#: a provider that did not answer so often in a row is not named any more
_PATIENCE = 2
#: until the next look, while somebody is missed
_MISSED_PAUSE_S = 1.0


class Dataset:
    """A dataset and who serves it now. ``providers`` may become empty, and fill again."""

    def __init__(self, name: str, description: DatasetDescription, providers: list[PeerRef]) -> None:
        self.name = name
        self.manifest: Manifest = description.manifest
        self.manifest_hash = description.manifest_hash
        self.providers: dict[str, PeerRef] = {ref.peer: ref for ref in providers}
        self._silent: dict[str, int] = {}
        self._refused: set[str] = set()
        self._missed = trio.Event()

    def providers_for(self, index: int) -> tuple[PeerRef, ...]:
        """All providers, each slice beginning with another one, so that the load is spread."""
        refs = [self.providers[peer] for peer in sorted(self.providers)]
        first = index % len(refs) if refs else 0
        return tuple(refs[first:] + refs[:first])

    async def watch(self, node: Node) -> None:
        """Keep ``providers`` true until cancelled. One that is lost is asked at once if it still lives."""
        pause_s = _MISSED_PAUSE_S
        async with node.watch_peers() as lost, trio.open_nursery() as nursery:
            nursery.start_soon(self._listen, lost)
            while True:
                missed = not self.providers or bool(self._silent)
                with trio.move_on_after(_MISSED_PAUSE_S if missed else pause_s):
                    await self._missed.wait()
                self._missed = trio.Event()
                await self.refresh(node)
                pause_s = min(REFRESH_S, pause_s * 2.0)

    async def _listen(self, lost: trio.MemoryReceiveChannel[PeerLost]) -> None:
        async for event in lost:
            if event.peer in self.providers:
                self._missed.set()

    async def refresh(self, node: Node) -> None:
        """Ask the known ones and look for more, once."""
        known = dict(self.providers)
        for ref in await _announced(node, self.name):
            known[ref.peer] = ref
        answers, gone = await _describe(node, self.name, list(known.values()), self._refused)
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
                if peer not in self._refused:
                    logger.error(
                        "A data node serves different data under the name %s (manifest %s, not %s); "
                        "it is not used",
                        self.name,
                        answer.manifest_hash[:16],
                        self.manifest_hash[:16],
                        extra={"peer_id": peer},
                    )
                self._refused.add(peer)
                continue
            self._refused.discard(peer)
            if peer not in self.providers:
                logger.info("Another data node serves %s", self.name, extra={"peer_id": peer})
            self.providers[peer] = ref


async def find_dataset(
    node: Node, name: str, wait_s: float | None, say: Callable[[str], None] = lambda why: None
) -> Dataset:
    """Wait until somebody serves ``name``, at most ``wait_s``; ``say`` is told why it is not there yet.

    Raises :class:`DatasetNotFound`, or :class:`DatasetMismatch` when replicas differ at the start:
    nobody but the user can say which is meant.
    """
    pause_s, said = _FIRST_PAUSE_S, False
    refused: set[str] = set()
    silent: list[PeerRef] = []
    with trio.move_on_after(float("inf") if wait_s is None else wait_s):
        while True:
            refs = await _announced(node, name)
            answers, _ = await _describe(node, name, refs, refused)
            silent = [ref for ref in refs if ref.peer not in answers]
            if answers:
                # one more look: the nearest peers of the DHT may not all have heard of all replicas
                await trio.sleep(_FIRST_PAUSE_S)
                more = [ref for ref in await _announced(node, name) if ref.peer not in answers]
                answers |= (await _describe(node, name, more, refused))[0]
                refs = [*refs, *more]
                return _agreed(name, answers, {ref.peer: ref for ref in refs})
            say(_why_not(silent))
            if not said:
                said = True
                logger.info("Nobody serves the dataset %s yet; waiting for a data node", name)
            await trio.sleep(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, pause_s * 1.5)
    raise DatasetNotFound(f"nobody served the dataset {name} within {wait_s:g} s; {_why_not(silent)}")


def _why_not(silent: list[PeerRef]) -> str:
    if not silent:
        return "no data node announces it: is the name right, and does its data node reach the same gateway?"
    names = ", ".join(shown(ref.peer) for ref in silent)
    return f"{len(silent)} data node(s) announce it but do not answer: {names}"


def _agreed(name: str, answers: dict[str, DatasetDescription], refs: dict[str, PeerRef]) -> Dataset:
    by_hash: dict[str, list[str]] = {}
    for peer, answer in sorted(answers.items()):
        by_hash.setdefault(answer.manifest_hash, []).append(peer)
    if len(by_hash) > 1:
        groups = "; ".join(f"{value[:16]} at {', '.join(peers)}" for value, peers in sorted(by_hash.items()))
        raise DatasetMismatch(
            f"data nodes serve different data under the name {name}: {groups}. "
            "Give one of them another name, or make their directories equal"
        )
    first = next(iter(answers.values()))
    return Dataset(name, first, [refs[peer] for peer in answers])


async def _announced(node: Node, name: str) -> list[PeerRef]:
    try:
        return await node.find_providers(name)
    except NetworkError as exc:
        logger.debug("Looking for providers of %s failed: %s", name, exc)
        return []


async def _describe(
    node: Node, name: str, refs: list[PeerRef], refused: set[str]
) -> tuple[dict[str, DatasetDescription], set[str]]:
    """What each says of the dataset, and on whose machine nobody listens any more. Who is no data node is
    added to ``refused``, and told of once.
    """
    answers: dict[str, DatasetDescription] = {}
    gone: set[str] = set()

    async def ask(ref: PeerRef) -> None:
        try:
            answer = await node.request(ref, DescribeDataset(dataset=name), timeout_s=_ASK_TIMEOUT_S)
        except NetworkError as exc:
            logger.debug("Provider %s of %s: %s", ref.peer, name, exc)
            if isinstance(exc, PeerUnreachable) and exc.gone:
                gone.add(ref.peer)
            return
        roles = node.roles_of(ref.peer)
        if roles and "data" not in roles:
            # anybody may announce anything; with other data under the name it would stop every job
            if ref.peer not in refused:
                logger.warning(
                    "A node announces %s and is no data node: its certificate has the role %s; "
                    "it is not used",
                    name,
                    " and ".join(sorted(roles)),
                    extra={"peer_id": ref.peer},
                )
            refused.add(ref.peer)
        elif isinstance(answer, DatasetDescription):
            answers[ref.peer] = answer

    async with trio.open_nursery() as nursery:
        for ref in refs:
            nursery.start_soon(ask, ref)
    return answers, gone
