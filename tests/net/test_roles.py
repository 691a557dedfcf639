"""What each role may do, tried by each role: every row of ``hypha.access``, over one real network. And what a
certificate could do that it may not.
"""

from __future__ import annotations

import itertools
import typing
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.utils.varint import encode_varint_prefixed, read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr
from tests.net.test_gossip_and_dht import worker_request
from tests.recorded.examples import example
from tests.support.network import Network, address_of, until

from hypha import access
from hypha.config.job import DatasetRef
from hypha.errors import IdentityError, PeerUnreachable, Refused
from hypha.messages import (
    WORKER_TOPIC,
    Acknowledged,
    BulkDial,
    GossipEnvelope,
    Health,
    JobStamp,
    PeerRef,
    PullFile,
    Request,
    Response,
    SameCertificate,
    TransferMeta,
    replica_name,
)
from hypha.net import Libp2pNode as Node
from hypha.net import meta_of
from hypha.net.discovery.dht import DhtClient, key_of
from hypha.net.libp2p.streams import STREAM_ERRORS, discard
from hypha.pki import authority, certificates, identity
from hypha.pki.authority import CaFiles, make_org
from hypha.pki.identity import load_identity
from hypha.scheduler.data.datasets import why_not_used

pytestmark = pytest.mark.loopback

#: answered by every node itself
BUILT_IN = (Health, SameCertificate, BulkDial)


@dataclass
class Cast:
    """A gateway that serves, and two leaves of each role, all connected with each other."""

    gateway: Node
    callers: dict[str, Node]
    targets: dict[str, Node]

    @property
    def target(self) -> Node:
        """Somebody to ask."""
        return self.targets["data"]


@asynccontextmanager
async def cast(network: Network) -> AsyncIterator[Cast]:
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(network.gateway(require_roles=True))
        found: list[dict[str, Node]] = [{}, {}]
        for role, nodes in itertools.product(access.ROLES, found):
            leaf = network.leaf(role, [gateway], roles=(role,), require_roles=True)
            nodes[role] = await stack.enter_async_context(leaf)
        for caller, target in itertools.product(found[0].values(), found[1].values()):
            await caller.connect(target.ref())
        yield Cast(gateway, *found)


def may(role: str, allowed: access.Allowed) -> bool:
    return allowed is None or role in allowed


async def test_each_role_may_do_what_the_table_says_and_nothing_else(
    network: Network, tmp_path: Path
) -> None:
    async with cast(network) as nodes:
        await try_requests(nodes)
        await try_streams(nodes)
        await try_topic(nodes)
        await try_directory(nodes)
        await try_kinds(nodes, tmp_path)
        for (service, use), (role, node) in itertools.product(access.SERVICES.items(), nodes.targets.items()):
            user = nodes.callers["scheduler"]
            allowed = may(role, use.by)
            assert user._peers.may_serve_as(service, node.peer_id) is allowed, (service, role)
            if service == "dataset":
                assert (why_not_used(DatasetRef(dataset="d"), user, node.peer_id) is None) is allowed


async def try_requests(nodes: Cast) -> None:
    async def answer(caller: str, request: Any) -> Response:
        return Acknowledged()

    for kind in access.REQUESTS:
        if kind not in BUILT_IN:
            nodes.target.answer(kind, answer)
    for (kind, use), (role, caller) in itertools.product(access.REQUESTS.items(), nodes.callers.items()):
        code = ""
        try:
            await caller.request(nodes.target.peer_id, example(kind, least=True))
        except Refused as exc:
            code = exc.code
        allowed = may(role, use.by)
        assert (code != "role") is allowed, f"{kind.__name__} by {role}: {code!r}"
        # it was answered, or refused for what the example says
        assert not allowed or code == "" or kind in BUILT_IN, f"{kind.__name__} by {role}: {code!r}"


async def try_streams(nodes: Cast) -> None:
    """The gateway speaks all protocols."""
    for (protocol, use), (role, caller) in itertools.product(access.STREAMS.items(), nodes.callers.items()):
        stream = None
        with suppress(PeerUnreachable):  # a refusal may come before the protocol is agreed on
            stream = await caller._streams.open(nodes.gateway.peer_id, protocol)
        # whoever was refused has been when the answer to a later request is there
        await caller.request(nodes.gateway.peer_id, Health())
        refused = (caller.peer_id, f"a stream of {protocol}") in nodes.gateway._streams._over_limit._logged
        assert refused is not may(role, use.by), f"{protocol} by {role}"
        assert refused or stream is not None
        if stream is not None:
            await discard(stream)


async def try_topic(nodes: Cast) -> None:
    (use,) = access.TOPICS.values()
    listener = nodes.targets["worker"]
    heard: list[str] = []
    async with listener.subscribe() as requests:
        for role, caller in nodes.callers.items():
            await caller.publish(worker_request(caller, role))
        with trio.fail_after(10):
            await until(lambda: len(nodes.gateway._gossip._over_limit._logged) == 3)
            heard.append((await requests.receive()).request.request_id)
        with trio.move_on_after(0.5):
            heard.append((await requests.receive()).request.request_id)
    assert heard == [role for role in access.ROLES if may(role, use.by)]


def queries(caller: Node) -> dict[str, Message]:
    def announce(name: str) -> Message:
        message = Message(type=Message.ADD_PROVIDER, key=key_of(name))
        own = message.providerPeers.add()
        own.id = caller._host.get_id().to_bytes()
        own.addrs.append(Multiaddr(caller.listen_addresses()[0]).to_bytes())
        return message

    put = Message(type=Message.PUT_VALUE, key=b"/v/key")
    put.record.key, put.record.value = b"/v/key", b"value"
    return {
        "provide dataset": announce("digits"),
        "provide checkpoints": announce(replica_name(caller.peer_id, "job")),
        "find": Message(type=Message.GET_PROVIDERS, key=key_of("digits")),
        "find node": Message(type=Message.FIND_NODE, key=caller._host.get_id().to_bytes()),
        "ping": Message(type=Message.PING),
        "put value": put,
        "get value": Message(type=Message.GET_VALUE, key=b"/v/key"),
    }


async def ask_directory(caller: Node, gateway: str, *asked: Message) -> list[Message]:
    """The answers, on one stream, until it ends."""
    stream = await caller._streams.open(gateway, access.KADEMLIA_PROTOCOL)
    found = []
    try:
        for one in asked:
            await stream.write(encode_varint_prefixed(one.SerializeToString()))
        while True:
            answer = Message()
            answer.ParseFromString(await read_varint_prefixed_bytes_limited(stream, 1 << 20))
            found.append(answer)
    except (*STREAM_ERRORS, EOFError, ValueError):
        return found
    finally:
        await discard(stream)


async def try_directory(nodes: Cast) -> None:
    gateway = nodes.gateway.peer_id
    for role, caller in nodes.callers.items():
        asked = queries(caller)
        assert set(asked) == set(access.DIRECTORY)
        for query, message in asked.items():
            answered = await ask_directory(caller, gateway, message)
            assert bool(answered) is may(role, access.DIRECTORY[query].by), f"{query} by {role}"
    # neither as a second query on a stream on which the first was allowed, nor under a key of no kind
    caller = nodes.callers["worker"]
    asked = queries(caller)
    assert len(await ask_directory(caller, gateway, asked["find"], asked["provide dataset"])) == 1
    asked["provide dataset"].key = b"else"
    assert await ask_directory(nodes.callers["data"], gateway, asked["provide dataset"]) == []
    providers = await nodes.callers["scheduler"].find_providers("digits")
    assert [ref.peer for ref in providers] == [nodes.callers["data"].peer_id]


async def try_kinds(nodes: Cast, directory: Path) -> None:
    source = directory / "source"
    source.write_bytes(b"content")
    number = itertools.count()

    async def gate(caller: str, meta: TransferMeta) -> Path:
        return directory / f"there-{next(number)}"

    async def arrived(caller: str, meta: TransferMeta, path: Path) -> None:
        assert path.read_bytes() == b"content"

    async def provide(caller: str, request: PullFile) -> tuple[Path, TransferMeta]:
        return source, await meta_of(source, request.kind, request.name)

    for kind in access.KINDS:
        for node in nodes.targets.values():
            node.transfers.accept(kind, None, gate, arrived)
        for node in nodes.callers.values():
            node.transfers.serve(kind, provide)

    async def attempt(kind: str, sender: str, receiver: str) -> None:
        near, far = nodes.callers[sender], nodes.targets[receiver]
        use = access.KINDS[kind]
        allowed = may(sender, use.senders) and may(receiver, use.receivers)
        stamp = JobStamp(job_id="job", generation=0, round=0)
        meta = await meta_of(source, kind, "file", stamp=stamp)
        code = ""
        try:
            await near.transfers.send(far.peer_id, source, meta)
        except Refused as exc:
            code = exc.code
        assert code == ("" if allowed else "role"), f"{kind} sent by {sender} to {receiver}"
        code = ""
        try:
            wanted = PullFile(kind=kind, name="file")
            await far.transfers.pull(near.peer_id, wanted, directory / f"{next(number)}", None, 100)
        except Refused as exc:
            code = exc.code
        assert code == ("" if allowed else "role"), f"{kind} pulled by {receiver} from {sender}"

    for kind, sender, receiver in itertools.product(access.KINDS, nodes.callers, nodes.targets):
        use = access.KINDS[kind]
        # each end refuses by itself: what both would refuse tells nothing more
        if may(sender, use.senders) or may(receiver, use.receivers):
            await attempt(kind, sender, receiver)


async def test_the_table_leaves_out_nothing_that_a_node_answers(network: Network) -> None:
    async with network.gateway() as gateway:
        spoken = {str(protocol) for protocol in gateway._host.get_mux().handlers}
    assert spoken == {*access.STREAMS, *access.LIBRARY_STREAMS}
    assert set(typing.get_args(Request)) == set(access.REQUESTS)
    assert set(access.TOPICS) == {WORKER_TOPIC}
    assert len(access.DIRECTORY) - 1 == len(Message.MessageType.keys())  # two kinds of announcements


# --- a worker's certificate can do nothing but work -------------------------------------------------


async def test_a_worker_is_no_gateway_to_anybody(network: Network, caplog: pytest.LogCaptureFixture) -> None:
    """Not even one that runs a gateway's program: its certificate counts."""
    async with (
        network.gateway(roles=("worker",)) as impostor,
        network.leaf("scheduler", [impostor], roles=("scheduler",), connected=False) as scheduler,
        network.gateway([impostor]) as gateway,
    ):
        await until(lambda: caplog.text.count("it is not used as gateway, which needs a certificate") == 2)
        assert "this one carries the role worker" in caplog.text
        assert scheduler.gateway is None
        assert scheduler._gateways.connected() == []
        assert gateway._gateways.connected() == []
        assert await scheduler.find_providers("digits") == []
        assert not scheduler._gossips_with(impostor.peer_id)
        assert gateway.dht_server is not None
        assert gateway.dht_server.known == 0


async def test_an_impostor_among_gateways_is_passed_over(network: Network) -> None:
    async with (
        network.gateway(roles=("worker",)) as impostor,
        network.gateway() as gateway,
        network.leaf("worker", [impostor, gateway], roles=("worker",)) as worker,
    ):
        assert worker.gateway == gateway.peer_id


async def test_a_worker_is_no_relay(network: Network) -> None:
    """Whose address leads through one is reached through a gateway, or not at all."""
    async with (
        network.gateway(roles=("worker",)) as impostor,
        network.leaf("data", [impostor], roles=(), connected=False) as hidden,
        network.leaf("scheduler", roles=("scheduler",)) as scheduler,
    ):
        await hidden.connect(PeerRef(peer=impostor.peer_id, addresses=(address_of(impostor),)))
        await hidden._relay.reserve(impostor.peer_id)
        assert impostor.hop is not None
        assert impostor.hop.reservations == 1
        circuit = f"{address_of(impostor)}/p2p-circuit/p2p/{hidden.peer_id}"
        with pytest.raises(PeerUnreachable, match="it is not used as relay"):
            await scheduler.connect(PeerRef(peer=hidden.peer_id, addresses=(circuit,)))


async def test_whom_a_gateway_names_as_another_is_asked_only_if_it_is_one(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = DhtClient._ask

    async def ask(self: DhtClient, peer: str, request: Message) -> Message:
        asked.append(peer)
        answer = await real(self, peer, request)
        if peer == gateway.peer_id:
            named = answer.closerPeers.add()
            named.id = impostor._host.get_id().to_bytes()
            named.addrs.append(Multiaddr(impostor.listen_addresses()[0]).to_bytes())
        else:
            pytest.fail(f"{peer} answered")
        return answer

    async with (
        network.gateway(roles=("worker",)) as impostor,
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
    ):
        monkeypatch.setattr(DhtClient, "_ask", ask)
        assert await scheduler.find_providers("digits") == []
        assert asked == [gateway.peer_id, impostor.peer_id]


# --- what authorities vouch for ---------------------------------------------------------------------


async def test_a_certificate_of_a_limited_organisation_is_refused_by_every_node(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSL has nothing against it."""
    pki = network.pki
    own, made = pki.org, make_org("Limited", pki.root, pki.directory, roles=["data"])
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
    ):
        pki.org = CaFiles(made.cert, made.key, made.trust)
        async with network.leaf("data", [gateway], roles=("data",)) as data:
            await data.connect(scheduler.ref())
            assert scheduler.organization_of(data.peer_id) == "Limited"
            assert data.organization_of(scheduler.peer_id) == "Test"
            assert {one.organization for one in data.connections()} == {"Test"}
        # its owner has the key, and need not use our program
        monkeypatch.setattr(authority, "_check_limit", lambda *of: None)
        files = pki.files("boss", ("scheduler",))
        pki.org = own
        with pytest.raises(IdentityError, match="may only vouch for the role data"):
            load_identity(files)
        # nor our check of its own certificate
        monkeypatch.setattr(identity, "_check_own", lambda *of: None)
        with monkeypatch.context() as patch:
            patch.setattr(certificates, "_beyond_limit", lambda *of: None)
            boss = load_identity(files)
        async with network.leaf("scheduler", identity=boss, require_roles=True) as node:
            with pytest.raises(PeerUnreachable, match="may only vouch for the role data"):
                await node.connect(PeerRef(peer=gateway.peer_id, addresses=(address_of(gateway),)))


async def test_a_node_without_a_role_says_so_when_it_starts(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    async with network.leaf("worker") as nobody, network.leaf("data", roles=("data",)):
        assert caplog.text.count("The certificate of this node carries no role") == 1
        cert = nobody.identity.files.cert
        assert f"`hypha-certutil renew {cert} --role worker --ca-cert" in caplog.text


# --- who publishes ----------------------------------------------------------------------------------


async def test_a_request_says_who_asks_to_a_worker_that_never_met_the_scheduler(network: Network) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("worker", [gateway], roles=("worker",)) as worker,
        worker.subscribe() as heard,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
    ):
        await scheduler.publish(worker_request(scheduler, "r"))
        with trio.fail_after(5):
            assert (await heard.receive()).publisher == scheduler.peer_id
        assert not worker.is_connected(scheduler.peer_id)


async def test_a_request_without_a_certificate_is_taken_and_passed_on_by_nobody(
    network: Network, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("worker", [gateway], roles=("worker",)) as worker,
        worker.subscribe() as heard,
        network.leaf("publisher", [gateway], roles=("scheduler",)) as publisher,
    ):
        with monkeypatch.context() as patch:
            patch.setattr("hypha.net.discovery.gossip.MAX_CERTIFICATES", 0)
            await publisher.publish(worker_request(publisher, "without"))
        await until(lambda: "no certificate is with it" in caplog.text)
        await publisher.publish(worker_request(publisher, "with"))
        with trio.fail_after(5):
            assert (await heard.receive()).request.request_id == "with"


async def test_a_certificate_of_somebody_else_proves_nothing(network: Network) -> None:
    scheduler = network.pki.identity("scheduler", roles=("scheduler",))
    async with (
        network.gateway() as gateway,
        network.leaf("worker", [gateway], roles=("worker",)) as worker,
    ):

        def refused(publisher: str, *certificates: bytes) -> bool:
            envelope = GossipEnvelope(body=worker_request(gateway, "r"), certificates=certificates)
            return worker._gossip._refused(publisher, msgspec.msgpack.encode(envelope))

        assert not refused(scheduler.peer_id, *scheduler.certificates)
        for stolen in (scheduler.certificates, (b"\xff", b""), (scheduler.certificates[1],), ()):
            assert refused(gateway.peer_id, *stolen)


async def test_without_require_roles_a_certificate_without_one_may_do_everything(network: Network) -> None:
    async with (
        network.gateway(roles=()) as gateway,
        network.leaf("worker", [gateway]) as worker,
        worker.subscribe() as heard,
        network.leaf("anybody", [gateway]) as anybody,
    ):
        await anybody.publish(worker_request(anybody, "r"))
        with trio.fail_after(5):
            assert (await heard.receive()).publisher == anybody.peer_id
        assert await anybody.provide("digits") == 1


async def test_copies_of_checkpoints_are_found_where_datasets_are(network: Network) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("worker", [gateway], roles=("worker",)) as worker,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
    ):
        name = replica_name(scheduler.peer_id, "job")
        assert await worker.provide(name) == 1
        assert await worker.provide("digits") == 0
        assert [ref.peer for ref in await scheduler.find_providers(name)] == [worker.peer_id]
