"""A gateway in this process: it says where it is, answers locally, and refuses a taken port."""

from __future__ import annotations

import logging
from pathlib import Path

import httpx
import pytest
import trio

from hypha.config.models import GatewayConfig
from hypha.errors import AddressTaken
from hypha.gateway import run_gateway
from hypha.messages import Health, HealthReport, PeerRef
from hypha.net import NodeOptions, open_node
from hypha.pki.authority import CaFiles, make_node, make_org, make_root
from hypha.pki.identity import IdentityFiles, load_identity

pytestmark = pytest.mark.loopback


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki")
    root = make_root("Test", directory)
    organisation = make_org("Lab", CaFiles(root.cert, root.key), directory)
    for name in ("gateway", "worker"):
        ca = CaFiles(organisation.cert, organisation.key, organisation.trust)
        make_node(name, ca, directory, roles=[name])
    return directory


def config(pki: Path, port: int = 0, **more: object) -> GatewayConfig:
    return GatewayConfig.model_validate(
        {
            **{f"{kind}_pem": pki / f"gateway-{kind}.pem" for kind in ("cert", "key", "trust")},
            "listen_addresses": [f"/ip4/127.0.0.1/tcp/{port}"],
            "external_addresses": ["/dns4/gateway.example.org/tcp/8080"],
            "exclude_cidr": [],
            **more,
        }
    )


async def test_it_says_where_it_is_and_how(pki: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hypha")
    files = IdentityFiles(*(pki / f"worker-{kind}.pem" for kind in ("cert", "key", "trust")))
    async with trio.open_nursery() as nursery:
        ref: PeerRef = await nursery.start(run_gateway, config(pki, http_address="127.0.0.1:0"))
        assert ref.addresses[0] == f"/dns4/gateway.example.org/tcp/8080/p2p/{ref.peer}"
        ready = next(record for record in caplog.records if hasattr(record, "addresses"))
        assert ready.addresses == list(ref.addresses)
        assert all(address in ready.getMessage() for address in ref.addresses)

        http = next(
            vars(record)["http_address"] for record in caplog.records if "http_address" in vars(record)
        )
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.get(f"http://{http}/health")
        assert (answer.status_code, answer.json()["peer"]) == (200, ref.peer)
        assert answer.json()["details"]["reservations"] == "0"

        options = NodeOptions(identity=load_identity(files), component="hypha-worker", listen=())
        async with open_node(options) as node:
            node.learn(ref)
            report = await node.request(ref.peer, Health())
        assert isinstance(report, HealthReport)
        assert (report.healthy, report.component) == (True, "hypha-gateway")
        nursery.cancel_scope.cancel()


async def test_a_taken_port_is_told(pki: Path) -> None:
    with trio.socket.socket() as taken:
        await taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.RaisesGroup(
            pytest.RaisesExc(AddressTaken, match="cannot listen on .*: Address already in use"),
            flatten_subgroups=True,
        ):
            async with trio.open_nursery() as nursery:
                await nursery.start(run_gateway, config(pki, taken.getsockname()[1]))


async def test_a_second_node_on_the_port_is_told(pki: Path) -> None:
    files = IdentityFiles(*(pki / f"worker-{kind}.pem" for kind in ("cert", "key", "trust")))
    options = NodeOptions(load_identity(files), "hypha-worker", listen=("/ip4/127.0.0.1/tcp/0",))
    async with open_node(options) as first:
        (address,) = first.listen_addresses()
        with pytest.RaisesGroup(pytest.RaisesExc(AddressTaken, match=address), flatten_subgroups=True):
            async with trio.open_nursery() as nursery:
                await nursery.start(run_gateway, config(pki, int(address.rpartition("/")[2])))
