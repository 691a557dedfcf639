"""Faults of the network, staged with real nodes on loopback: what is found, and nothing where all is well."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.cli.doctor.staging import among, only, worker_config
from tests.data.reading import write_slices
from tests.net.test_resolving import Names
from tests.support.network import Network, address_of, until
from tests.support.proxy import proxy_to

from hypha.cli.doctor import checks
from hypha.cli.doctor.checks import Finding
from hypha.cli.doctor.gathered import Observations
from hypha.cli.doctor.gathering import contacts
from hypha.cli.doctor.judging.network import judge_network
from hypha.cli.doctor.subject import Subject
from hypha.cli.doctor.whole import gather, judge
from hypha.config.job import DatasetRef
from hypha.config.models import DataConfig, DatasetConfig, GatewayConfig, NodeConfig
from hypha.data import run_data
from hypha.errors import Refused
from hypha.messages import DialBack, Health, MeasureBandwidth, PeerRef, Response
from hypha.net import Libp2pNode as Node
from hypha.net.options import RelayLimits
from hypha.net.peers.addresses import host_and_port
from hypha.pki.identity import IdentityFiles, load_identity
from hypha.runtime import Runtime, use_runtime
from hypha.telemetry import health_of

pytestmark = pytest.mark.loopback


def subject_of(config: NodeConfig, component: str) -> Subject:
    files = IdentityFiles(config.cert_pem, config.key_pem, config.trust_pem, config.crls_pem)
    return Subject(component, Path(f"{component}.toml"), config, files)


async def look(
    config: NodeConfig, component: str = "worker", **wanted: Any
) -> tuple[Observations, list[Finding]]:
    """What the doctor sees and finds. How fast the disk is while other tests use it is left out."""
    subject = subject_of(config, component)
    with trio.fail_after(60):
        observed = await gather(subject, **wanted)
    unhurried = tuple(replace(one, write_rate=None) for one in observed.machine.directories)
    observed = replace(observed, machine=replace(observed.machine, directories=unhurried))
    return observed, judge(subject, observed)


def free_port() -> int:
    """Nobody listens there now."""
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        port: int = tried.getsockname()[1]
        return port


@asynccontextmanager
async def web_server() -> AsyncIterator[str]:
    """Something that answers, and is no node."""

    async def answer(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, answer, [listener])
        yield f"/ip4/127.0.0.1/tcp/{listener.socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


def of(observed: Observations, address: str, config: NodeConfig) -> list[Finding]:
    """What is found of one gateway alone."""
    assert observed.network is not None
    (contact,) = (one for one in observed.network.gateways if one.address == address)
    return list(judge_network(replace(observed.network, gateways=(contact,)), observed.machine, config))


# --- a healthy node --------------------------------------------------------------------------------------


async def test_nothing_is_found_of_a_healthy_node_whether_it_runs_or_not(
    network: Network, tmp_path: Path
) -> None:
    directory = write_slices(tmp_path / "digits")
    async with network.gateway() as gateway, trio.open_nursery() as nursery:
        settings = network.settings("data", [gateway])
        await nursery.start(run_data, DataConfig(**settings, dataset_path=directory))
        port, http = free_port(), free_port()
        config = worker_config(
            network.pki,
            tmp_path,
            gateway_addresses=[address_of(gateway)],
            listen_addresses=[f"/ip4/127.0.0.1/tcp/{port}"],
            http_address=f"127.0.0.1:{http}",
        )
        ref = DatasetRef(dataset="digits")
        observed, findings = await look(config, dataset=ref)
        assert findings == [], "\n".join(map(str, findings))
        assert observed.network is not None
        assert observed.dataset is not None
        assert observed.network.running is False
        (contact,) = observed.network.gateways
        assert min(contact.up or 0.0, contact.down or 0.0) > 0
        assert (contact.mtu or 0) > 1280
        assert [one.reason for one in observed.network.dialled] == [""]
        (provider,) = observed.dataset.providers
        assert (provider.relayed, bool(provider.rate)) == (False, True)
        (data_node,) = observed.network.data_nodes
        assert (data_node.component, data_node.up is not None) == ("hypha-data", True)

        identity = load_identity(IdentityFiles(config.cert_pem, config.key_pem, config.trust_pem))
        listening = tuple(config.listen_addresses)
        async with network.leaf("worker", [gateway], identity=identity, listen=listening) as worker:
            beside = config.model_copy(update={"http_address": None})
            observed, findings = await look(beside, dataset=ref)
            assert findings == [], "\n".join(map(str, findings))
            assert observed.network is not None
            assert observed.network.running is True
            # the very node was dialled, and is none the worse for it
            assert [one.reason for one in observed.network.dialled] == [""]
            assert worker.gateway == gateway.peer_id
        nursery.cancel_scope.cancel()


async def test_nothing_is_found_of_a_gateway_or_a_data_node(network: Network, tmp_path: Path) -> None:
    directory = write_slices(tmp_path / "digits")
    async with network.gateway() as other:
        port = free_port()
        files = network.pki.files("gateway", ("gateway",))
        gateway = GatewayConfig(
            cert_pem=files.cert,
            key_pem=files.key,
            trust_pem=files.trust,
            listen_addresses=[f"/ip4/127.0.0.1/tcp/{port}"],
            external_addresses=[f"/ip4/127.0.0.1/tcp/{port}"],
            gateway_addresses=[address_of(other)],
            exclude_cidr=[],
        )
        _, findings = await look(gateway, "gateway")
        assert findings == [], "\n".join(map(str, findings))
        settings = network.settings("data", [other])
        data = DataConfig(**settings, dataset_path=directory, http_address=f"127.0.0.1:{free_port()}")
        async with trio.open_nursery() as nursery:
            for running in (False, True):
                observed, findings = await look(data, "data")
                assert findings == [], "\n".join(map(str, findings))
                assert observed.network is not None
                assert observed.network.running is running
                assert observed.served is not None
                assert observed.served.names == ("digits",)
                if not running:
                    await nursery.start(run_data, data)
            # its port is any free one: its own local HTTP tells which
            assert [one.reason for one in observed.network.dialled] == [""]
            nursery.cancel_scope.cancel()


# --- gateways --------------------------------------------------------------------------------------------


async def test_addresses_at_which_there_is_no_gateway(network: Network, tmp_path: Path) -> None:
    Names()
    others = Network(tmp_path / "others")
    async with (
        network.gateway() as gateway,
        network.leaf("worker", [gateway], roles=("worker",)) as worker,
        others.gateway() as foreign,
        web_server() as web,
    ):
        name = "/dns4/gateway.lab/tcp/8080"
        closed = f"/ip4/127.0.0.1/tcp/{free_port()}"
        wrong = f"{gateway.listen_addresses()[0]}/p2p/{worker.peer_id}"
        good, leaf, untrusted = map(address_of, (gateway, worker, foreign))
        config = worker_config(
            network.pki,
            tmp_path,
            gateway_addresses=[good, name, closed, wrong, leaf, web, untrusted],
        )
        observed, findings = await look(config)
        assert len(findings) == 6, "\n".join(map(str, findings))
        # one gateway is there, so that none of it keeps the node from the network
        assert {one.severity for one in findings} == {"warning"}
        assert of(observed, good, config) == []
        assert "has no address here" in only(of(observed, name, config), checks.GATEWAY_NAME).what
        found = only(of(observed, closed, config), checks.GATEWAY_UNREACHABLE)
        assert (found.severity, "nothing listens there" in found.what) == ("error", True)
        assert "not who the address names" in only(of(observed, wrong, config), checks.GATEWAY_OTHER).what
        assert "is no gateway" in only(of(observed, leaf, config), checks.GATEWAY_OTHER).what
        assert "no Hypha node" in only(of(observed, web, config), checks.GATEWAY_OTHER).what
        assert "trust bundle" in only(of(observed, untrusted, config), checks.GATEWAY_TRUST).what


async def test_a_gateway_that_does_not_accept_this_nodes_certificate(
    network: Network, tmp_path: Path
) -> None:
    """It is in this node's trust bundle, and this node not in its: told after the handshake."""
    others = Network(tmp_path / "others")
    async with network.gateway() as gateway:
        config = worker_config(others.pki, tmp_path, gateway_addresses=[address_of(gateway)])
        both = config.trust_pem.read_bytes() + network.pki.files("x").trust.read_bytes()
        config.trust_pem.write_bytes(both)
        _, findings = await look(config)
        assert "CA" in only(findings, checks.GATEWAY_TRUST).what


async def test_gateways_of_an_earlier_version_are_no_fault(network: Network, tmp_path: Path) -> None:
    """They know neither of the requests, and say of themselves what they said then."""

    async def unknown(caller: str, request: object) -> Response:
        raise Refused("malformed", "the request does not decode")

    async def as_before(caller: str, request: object) -> Response:
        return health_of(gateway)

    async with network.gateway() as gateway:
        gateway.answer(MeasureBandwidth, unknown)
        gateway.answer(DialBack, unknown)
        gateway.answer(Health, as_before)
        config = worker_config(network.pki, tmp_path, gateway_addresses=[address_of(gateway)])
        observed, findings = await look(config)
        assert findings == [], "\n".join(map(str, findings))
        assert observed.network is not None
        (contact,) = observed.network.gateways
        assert (contact.component, contact.up, contact.clock_s) == ("hypha-gateway", None, None)


class Early(Runtime):
    """A machine whose clock is wrong."""

    def wall_time(self) -> float:
        return super().wall_time() + 3600.0


async def test_a_clock_that_differs_from_that_of_its_gateways(network: Network, tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:

        async def hold(*, task_status: trio.TaskStatus[Node]) -> None:
            with use_runtime(Early()):
                async with network.gateway() as gateway:
                    task_status.started(gateway)
                    await trio.sleep_forever()

        first: Node = await nursery.start(hold)
        second: Node = await nursery.start(hold)
        config = worker_config(
            network.pki, tmp_path, gateway_addresses=[address_of(first), address_of(second)]
        )
        _, findings = await look(config)
        one = only(findings, checks.CLOCK_SKEW)
        assert "3600 s behind the clocks of all 2 peers" in one.what
        assert one.severity == "error"
        nursery.cancel_scope.cancel()


async def test_a_gateway_that_has_no_place_left(network: Network, tmp_path: Path) -> None:
    limits = RelayLimits(reservations=1)
    async with network.gateway(relay_limits=limits) as gateway, network.leaf("worker", [gateway]):
        await until(lambda: gateway.hop is not None and gateway.hop.reservations == 1)
        config = worker_config(network.pki, tmp_path, gateway_addresses=[address_of(gateway)])
        _, findings = await look(config)
        one = only(findings, checks.GATEWAY_UNWELL)
        assert ("1 of 1 reservations" in one.what, "max_reservations" in one.mend) == (True, True)


# --- to this node ----------------------------------------------------------------------------------------


async def test_a_node_that_its_gateway_cannot_dial(network: Network, tmp_path: Path) -> None:
    """It listens on another address than it is seen from, as behind NAT."""
    async with network.gateway() as gateway:
        config = worker_config(
            network.pki,
            tmp_path,
            gateway_addresses=[address_of(gateway)],
            listen_addresses=[f"/ip4/127.0.0.2/tcp/{free_port()}"],
        )
        _, findings = await look(config)
        one = only(findings, checks.NOT_DIALABLE)
        assert ("nothing listens there" in one.what, one.severity) == (True, "note")

        told = config.model_copy(update={"external_addresses": [f"/ip4/127.0.0.1/tcp/{free_port()}"]})
        _, findings = await look(told)
        assert only(findings, checks.NOT_DIALABLE).severity == "warning"


async def test_an_external_address_that_leads_nowhere(network: Network, tmp_path: Path) -> None:
    async with network.gateway() as gateway:
        wrong = f"/ip4/127.0.0.1/tcp/{free_port()}"
        config = worker_config(
            network.pki, tmp_path, gateway_addresses=[address_of(gateway)], external_addresses=[wrong]
        )
        _, findings = await look(config)
        assert wrong in only(findings, checks.EXTERNAL_ADDRESS).what
        Names()
        named = config.model_copy(update={"external_addresses": ["/dns4/worker.lab/tcp/4001"]})
        _, findings = await look(named)
        assert "its name has no address here" in only(findings, checks.EXTERNAL_ADDRESS).what


async def test_ports_that_are_in_use_or_not_of_this_machine(network: Network, tmp_path: Path) -> None:
    async with network.gateway() as gateway, web_server() as web:
        port = host_and_port(web)[1]
        config = worker_config(
            network.pki,
            tmp_path,
            gateway_addresses=[address_of(gateway)],
            listen_addresses=[web],
            http_address=f"127.0.0.1:{free_port()}",
        )
        _, findings = await look(config)
        one = only(findings, checks.PORT_IN_USE)
        assert f"sport = :{port}" in one.mend
        assert "no Hypha node" in one.what
        # another node of Hypha's
        _, findings = await look(config.model_copy(update={"listen_addresses": gateway.listen_addresses()}))
        assert gateway.peer_id in only(findings, checks.PORT_IN_USE).what
        foreign = config.model_copy(update={"listen_addresses": ["/ip4/192.0.2.1/tcp/4001"]})
        _, findings = await look(foreign)
        assert "no address of this machine" in only(findings, checks.PORT_IN_USE).what
        # of local HTTP: the gateway's port speaks none
        http = ":".join(map(str, host_and_port(gateway.listen_addresses()[0])))
        _, findings = await look(
            config.model_copy(update={"listen_addresses": ["/ip4/127.0.0.1/tcp/0"], "http_address": http})
        )
        assert "http_address" in only(findings, checks.PORT_IN_USE).what


# --- the way ---------------------------------------------------------------------------------------------


async def test_large_packets_that_do_not_get_through(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy that stops once a large request comes, and passes all the small ones before it."""
    monkeypatch.setattr(contacts, "SIZE_S", 1.0)
    async with (
        network.gateway() as gateway,
        proxy_to(*host_and_port(gateway.listen_addresses()[0])) as proxy,
        trio.open_nursery() as nursery,
    ):

        async def lose_large_ones() -> None:
            # fifteen small requests, the handshake and what nodes say beside them have less
            while proxy.passed_bytes < (15 << 10) + 20_000:
                await trio.sleep(0.001)
            proxy.freeze()

        nursery.start_soon(lose_large_ones)
        config = worker_config(network.pki, tmp_path, gateway_addresses=[f"/ip4/127.0.0.1/tcp/{proxy.port}"])
        _, findings = await look(config)
        among(findings, checks.LARGE_PACKETS)
        nursery.cancel_scope.cancel()


async def test_peers_by_address_and_by_peer_id(network: Network, tmp_path: Path) -> None:
    worker = network.leaf
    async with (
        network.gateway() as gateway,
        worker("worker", [gateway], roles=("worker",)) as other,
        worker("worker", [gateway], roles=("worker",), listen=()) as hidden,
    ):
        config = worker_config(network.pki, tmp_path, gateway_addresses=[address_of(gateway)])
        closed = f"/ip4/127.0.0.1/tcp/{free_port()}"
        await until(lambda: gateway.hop is not None and gateway.hop.reservations == 2)
        observed, findings = await look(config, peers=[address_of(other), hidden.peer_id, closed])
        assert closed in only(findings, checks.PEER_UNREACHABLE).what
        assert observed.network is not None
        direct, relayed, _ = observed.network.peers
        assert (direct.relayed, relayed.relayed) == (False, True)
        assert direct.up is not None
        assert relayed.up is not None


# --- datasets --------------------------------------------------------------------------------------------


async def serve(
    network: Network, gateway: Node, nursery: trio.Nursery, directory: Path, **dataset: Any
) -> PeerRef:
    """A real data node."""
    settings = network.settings("data", [gateway])
    config = DataConfig(**settings, datasets=[DatasetConfig(path=directory, **dataset)])
    found: PeerRef = await nursery.start(run_data, config)
    return found


async def announced(network: Network, gateway: Node, name: str, count: int) -> None:
    """Until the gateway knows of that many."""
    async with network.leaf("scheduler", [gateway], roles=("scheduler",)) as asking:
        with trio.fail_after(20):
            while len(await asking.find_providers(name)) < count:
                await trio.sleep(0.02)


async def test_datasets_that_are_not_what_the_job_wants(network: Network, tmp_path: Path) -> None:
    same, other = write_slices(tmp_path / "a" / "tiny-set"), write_slices(tmp_path / "b" / "tiny-set", seed=3)
    secret = write_slices(tmp_path / "secret")
    async with network.gateway() as gateway, trio.open_nursery() as nursery:
        await serve(network, gateway, nursery, same)
        await serve(network, gateway, nursery, other)
        await serve(network, gateway, nursery, secret, organizations=["Somebody Else"])
        await announced(network, gateway, "tiny-set", 2)
        await announced(network, gateway, "secret", 1)
        config = worker_config(network.pki, tmp_path, gateway_addresses=[address_of(gateway)])

        async def found(**ref: Any) -> list[Finding]:
            return (await look(config, dataset=DatasetRef(**ref)))[1]

        none = only(await found(dataset="mnist"), checks.DATASET_NOT_ANNOUNCED)
        assert "nobody announces 'mnist'" in none.what
        near = only(await found(dataset="Tiny_Set"), checks.DATASET_NAME)
        assert "but 'tiny-set' is announced" in near.what
        refused = only(await found(dataset="secret"), checks.DATASET_REFUSED)
        assert "organi" in refused.what
        differs = only(await found(dataset="tiny-set"), checks.DATASET_DIFFERS)
        assert "has several manifests" in differs.what
        pinned = await found(dataset="tiny-set", manifest_hash="0" * 64)
        assert [one.check for one in pinned] == [checks.DATASET_DIFFERS] * 2
        nursery.cancel_scope.cancel()


async def test_a_data_node_that_is_silent_or_reached_by_a_relay(network: Network, tmp_path: Path) -> None:
    directory = write_slices(tmp_path / "digits")
    async with network.gateway() as gateway, trio.open_nursery() as nursery:
        settings = {**network.settings("data", [gateway]), "listen_addresses": ["/ip4/127.0.0.2/tcp/0"]}
        # what it announces is in a network that is excluded at both ends, as private ones are by default
        settings["exclude_cidr"] = ["127.0.0.2/32"]
        await nursery.start(run_data, DataConfig(**settings, dataset_path=directory))
        await announced(network, gateway, "digits", 1)
        config = worker_config(
            network.pki,
            tmp_path,
            gateway_addresses=[address_of(gateway)],
            exclude_cidr=["127.0.0.2/32"],
        )
        _, findings = await look(config, dataset=DatasetRef(dataset="digits"))
        assert "through a relay" in only(findings, checks.DATA_RELAYED).what

        async with network.leaf("data", [gateway], roles=("data",)) as silent:
            # it announces, and does not answer what the dataset is
            await silent.provide("gone")
            _, findings = await look(config, dataset=DatasetRef(dataset="gone"))
            assert "does not answer DescribeDataset" in only(findings, checks.DATASET_UNREACHABLE).what
        nursery.cancel_scope.cancel()


async def test_a_data_node_whose_datasets_cannot_be_served(network: Network, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    good = write_slices(tmp_path / "digits")
    async with network.gateway() as gateway:
        settings = network.settings("data", [gateway])
        config = DataConfig(**settings, datasets=[DatasetConfig(path=empty), DatasetConfig(path=good)])
        _, findings = await look(config, "data")
        assert str(empty) in only(findings, checks.DATASET_UNUSABLE).mend
