"""The job's dataset: who announces it, who serves it, and how fast a slice comes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from hypha.cli.doctor.gathered import DatasetObservations, Provider
from hypha.cli.doctor.gathering.bounded import readable
from hypha.config.job import DatasetRef
from hypha.data.serving.serve import KIND
from hypha.errors import NetworkError, Refused
from hypha.messages import DatasetDescription, DescribeDataset, Manifest, PeerRef, PullFile
from hypha.naming import name_of
from hypha.net import Libp2pNode
from hypha.rules.manifests import manifest_problem
from hypha.runtime import in_thread
from hypha.scheduler.data.datasets import Pins

ASK_S = 10.0
#: a slice is pulled for so long at most: what came until then says how fast it comes
PULL_S = 5.0


@dataclass(frozen=True)
class Asking:
    """What this node may do: ``describe``, that is ask what the dataset is, and ``pull`` a slice of it."""

    describe: bool
    pull: bool


async def gather_dataset(node: Libp2pNode, wanted: DatasetRef, asking: Asking) -> DatasetObservations:
    """Raises NetworkError where nobody can be asked."""
    name = wanted.dataset
    refs = await node.find_providers(name)
    near = [] if refs else [one for one in _alike(name) if await node.find_providers(one)]
    found: dict[str, Provider] = {}

    async def look(ref: PeerRef) -> None:
        found[ref.peer] = await _provider(node, ref, wanted, asking)

    async with trio.open_nursery() as nursery:
        for ref in refs:
            if ref.peer != node.peer_id:
                nursery.start_soon(look, ref)
    return DatasetObservations(
        name, tuple(found[peer] for peer in sorted(found)), tuple(near), wanted.manifest_hash
    )


def _alike(name: str) -> list[str]:
    """Names that somebody may have meant: the gateways' directory finds exact ones alone."""
    changed = (
        name.strip(),
        name.lower(),
        name.replace("_", "-"),
        name.replace("-", "_"),
        name.replace(" ", "-"),
        name.rstrip("/").rpartition("/")[2],
        name.lower().replace("_", "-"),
    )
    return [one for one in dict.fromkeys(changed) if one and one != name]


async def _provider(node: Libp2pNode, ref: PeerRef, wanted: DatasetRef, asking: Asking) -> Provider:
    if not asking.describe:
        return await _reached(node, ref)
    try:
        answer = await node.request(ref, DescribeDataset(dataset=wanted.dataset), ASK_S)
    except NetworkError as exc:
        refused = isinstance(exc, Refused) and exc.code in ("role", "not-allowed", "not-found")
        reason = exc.reason if isinstance(exc, Refused) else str(exc)
        return Provider(ref.peer, name_of(ref.peer), reason=readable(reason), refused=refused)
    provider = Provider(ref.peer, name_of(ref.peer), relayed=_relayed(node, ref.peer))
    if (problem := Pins.of(wanted).problem(node, ref.peer)) is not None:
        return replace(provider, reason=f"it {problem}", refused=True)
    if not isinstance(answer, DatasetDescription):
        return replace(provider, reason=f"it answers with {type(answer).__name__}")
    if problem := await in_thread(manifest_problem, answer.manifest, answer.manifest_hash):
        return replace(provider, reason=f"it does not serve what it says: {readable(problem)}")
    return replace(
        provider,
        manifest_hash=answer.manifest_hash,
        largest_slice=max((one.size for one in answer.manifest.slices), default=0),
        rate=await _pull_rate(node, ref, wanted.dataset, answer.manifest) if asking.pull else None,
    )


async def _reached(node: Libp2pNode, ref: PeerRef) -> Provider:
    """As far as a node knows that may not ask."""
    try:
        await node.connect(ref)
    except NetworkError as exc:
        return Provider(ref.peer, name_of(ref.peer), reason=readable(str(exc)))
    return Provider(ref.peer, name_of(ref.peer), relayed=_relayed(node, ref.peer))


def _relayed(node: Libp2pNode, peer: str) -> bool:
    ways = {one.kind for one in node.connections() if one.peer == peer}
    return ways == {"relayed"}


async def _pull_rate(node: Libp2pNode, ref: PeerRef, name: str, manifest: Manifest) -> float | None:
    """Bytes a second, of the largest slice; None where nothing came; why stands in the provider's log."""
    sizes = {index: one.size for index, one in enumerate(manifest.slices) if one.size > 0}
    if not sizes:
        return None
    index = max(sizes, key=lambda one: sizes[one])
    request = PullFile(kind=KIND, name=f"{name}/{index}")
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "slice"
        began = trio.current_time()
        try:
            with trio.move_on_after(PULL_S):
                await node.transfers.pull(ref, request, place, None, sizes[index])
        except NetworkError:
            return None
        took_s = trio.current_time() - began
        parts = [place, place.with_name(f"{place.name}.part")]
        came = max((one.stat().st_size for one in parts if one.exists()), default=0)
    return came / took_s if took_s > 0 else None
