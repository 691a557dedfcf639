"""A network of processes that a real Prometheus scrapes: the specification's queries return data, its alerts
fire when their cause is staged, and reach a webhook by way of Alertmanager. A real collector (rotel) takes
what nodes send by each protocol. One network; the tests go on from each other, in their order, and each can
be run alone.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.support.monitoring import DEPLOY, WINDOW, Monitoring, installed, open_monitoring, shortened
from tests.support.otlp import http_receiver
from tests.support.polling import until
from tests.support.system import SMALL, System, digits_dataset, digits_job, keep_system, paced

from hypha.cli.local.children import Child
from hypha.cli.local.network import free_port

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not installed(), reason="needs Debian's prometheus and prometheus-alertmanager"),
]

JOB = "watched"
#: instead of the 60 s of SlowDataFetch: fetches take milliseconds here, some tenths when the machine is busy,
#: and more than this while the data node stands still
SLOW_S = 1.0
#: for so long, most of the time: as on a machine that swaps
STALL_S = 1.6
#: graphs of what has not happened in a quiet network, or is not to be had here
QUIET = {
    "Alerts",
    "GPU",
    "Short of leases",
    "Errors and warnings",
    "Failures",
    "Recovery",
    "Connections that failed",
    "Connections that ended",
    "Requests that were not answered well",
    "Transfers that failed",
    "Relay",
    "Relayed",
    "Circuits asked for",
    "Telemetry not delivered",
}


@dataclass
class Watched:
    """The network, its scheduler and who watches them."""

    system: System
    monitoring: Monitoring
    nodes: dict[str, Child]

    async def data(
        self, query: str, holds: Callable[[list[tuple[dict[str, str], float]]], bool] = bool
    ) -> list[tuple[dict[str, str], float]]:
        """What Prometheus answers, as soon as it ``holds``; NaN is no data."""
        seen: list[tuple[dict[str, str], float]] = []

        def there() -> bool:
            seen[:] = [one for one in self.monitoring.query(query) if one[1] == one[1]]
            return holds(seen)

        await until(there, 30, lambda: f"{query}: {seen}")
        return seen

    async def calm(self, *alerts: str) -> None:
        """Wait until none of them fires: on a busy machine a scrape may have come too late."""
        names = "|".join(alerts)
        await self.data(f'ALERTS{{alertname=~"{names}",alertstate="firing"}}', lambda seen: not seen)
        self.monitoring.notices.alerts.clear()

    async def fired(self, alert: str, timeout_s: float = 30) -> tuple[str, dict[str, Any]]:
        """The path and content of the first notice of it."""
        notices = self.monitoring.notices

        def known() -> str:
            return f"{self.monitoring.query('ALERTS')}\n{[(p, a['labels']) for p, a in notices.alerts]}"

        await until(lambda: bool(notices.of(alert)), timeout_s, known)
        return notices.of(alert)[0]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A gateway, a data node, two workers and a job, each with a local HTTP that Prometheus scrapes."""
    root = tmp_path_factory.mktemp("observed")
    address = {
        name: f"127.0.0.1:{free_port()}"
        for name in ("gateway", "data", "worker-1", "worker-2", f"{JOB}-scheduler")
    }
    targets = {
        "gateways": [address["gateway"]],
        "data": [address["data"]],
        "workers": [address["worker-1"], address["worker-2"]],
        "schedulers": [address[f"{JOB}-scheduler"]],
    }
    rules = shortened((DEPLOY / "rules" / "hypha.rules.yml").read_text())
    rules, changed = re.subn(
        r"(hypha_data_fetch_duration_bucket\[15s\]\)\)) > 60\b", rf"\1 > {SLOW_S}", rules
    )
    assert changed == 1
    nodes: dict[str, Child] = {}

    with (
        keep_system(root / "network") as system,
        open_monitoring(root / "watch", targets, rules) as monitoring,
    ):

        async def start() -> None:
            planned = system.plan_gateway()
            nodes["gateway"] = await system.gateway(planned={**planned, "http_address": address["gateway"]})
            dataset = digits_dataset(system.root)
            nodes["data"] = await system.data("data", dataset, http_address=address["data"])
            for name in ("worker-1", "worker-2"):
                nodes[name] = await system.worker(
                    name,
                    http_address=address[name],
                    executors=[paced(0.01), {"class": "aggregate", "name": "parameter-server"}],
                    # short, so that a frozen worker's renewals fail soon, again and again until it ends
                    offer={"lease_s": 12.0},
                    # slices are fetched all the time, as those that were are soon forgotten
                    cache={"max_slices": 2, "prefetch_s": 0},
                )
            job = digits_job(None, 2, 100_000, name=JOB, checkpoint={"every_rounds": 1}) | {"model": SMALL}
            job["resources"] |= {"min_workers": 1}
            scheduler = await system.job(job, http_address=address[f"{JOB}-scheduler"])
            nodes["scheduler"] = scheduler
            await system.reached(scheduler, lambda seen: seen.round >= 2)

        (root / "network").mkdir(exist_ok=True)
        trio.run(start)
        yield Watched(system, monitoring, nodes)


@pytest.mark.parametrize(
    ("query", "sane"),
    [
        (
            'sum(rate(hypha_lease_renewals_total{status="success"}[5m])) /\n'
            "sum(rate(hypha_lease_renewals_total[5m]))",
            lambda value: value == 1.0,
        ),
        ("sum(rate(hypha_training_samples_total[5m]))", lambda value: value > 10),
        (
            "histogram_quantile(0.95, rate(hypha_data_fetch_duration_bucket[5m]))",
            lambda value: 0 < value < SLOW_S,
        ),
        ("hypha_active_workers", lambda value: value == 2),
        (
            "sum(rate(hypha_network_bytes_sent_total[5m])) +\n"
            "sum(rate(hypha_network_bytes_received_total[5m]))",
            lambda value: value > 1000,
        ),
        ('up{job="hypha-gateway"}', lambda value: value == 1),
    ],
    ids=["renewals", "throughput", "fetch", "workers", "bandwidth", "gateway"],
)
async def test_a_query_of_the_specification_returns_data(
    watched: Watched, query: str, sane: Callable[[float], bool]
) -> None:
    short = query.replace("[5m]", f"[{WINDOW}]")
    found = await watched.data(short, lambda seen: bool(seen) and all(sane(value) for _, value in seen))
    print(f"{short} -> {found}")


async def test_jobs_are_told_apart_by_target_info(watched: Watched) -> None:
    query = "hypha_active_workers * on (job, instance) group_left (hypha_job) target_info"
    ((labels, _),) = await watched.data(query)
    assert (labels["hypha_job"], labels["job"]) == (JOB, "hypha-scheduler")


async def test_prometheus_takes_every_query_of_the_dashboards_and_has_data_for_it(watched: Watched) -> None:
    queries = [
        (
            f"{path.stem}: {panel['title']}",
            target["expr"].replace("$__rate_interval", WINDOW).replace("$hypha_job", JOB),
        )
        for path in sorted((DEPLOY / "dashboards").glob("*.json"))
        for panel in json.loads(path.read_text())["panels"]
        for target in panel.get("targets", ())
    ]
    assert {title.partition(": ")[2] for title, _ in queries} > QUIET
    empty: list[str] = []

    def all_there() -> bool:
        empty[:] = [title for title, query in queries if not watched.monitoring.query(query)]
        return {title.partition(": ")[2] for title in empty} <= QUIET

    await until(all_there, 20, lambda: f"no data for {empty}")


async def test_a_data_node_that_stalls_is_a_slow_data_fetch(watched: Watched) -> None:
    await watched.calm("SlowDataFetch")
    pid = watched.nodes["data"].process.pid
    notices = watched.monitoring.notices
    until_s = time.monotonic() + 40
    while not notices.of("SlowDataFetch") and time.monotonic() < until_s:
        os.kill(pid, signal.SIGSTOP)
        try:
            await trio.sleep(STALL_S)
        finally:
            os.kill(pid, signal.SIGCONT)
        await trio.sleep(0.1)
    path, alert = await watched.fired("SlowDataFetch", 1)
    assert path == "/day"
    assert alert["labels"]["job"] == "hypha-worker"
    assert alert["annotations"]["runbook_url"] == "docs/operator.md#slowdatafetch"


async def test_a_frozen_worker_is_failing_renewals_and_then_a_low_worker_count(watched: Watched) -> None:
    await watched.calm("HighLeaseRenewalFailures", "LowWorkerCount")
    pid = watched.nodes["worker-2"].process.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        path, alert = await watched.fired("HighLeaseRenewalFailures")
        assert path == "/day"
        assert alert["annotations"]["summary"] == "Lease renewal failure rate above 10%"
        path, alert = await watched.fired("LowWorkerCount")
        assert path == "/day"
        assert alert["annotations"]["description"].endswith("trains with 1 workers.")
        assert alert["annotations"]["hypha_job"] == JOB
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_a_gateway_that_was_killed_is_down(watched: Watched) -> None:
    await watched.calm("GatewayDown")
    watched.nodes["gateway"].process.kill()
    path, alert = await watched.fired("GatewayDown")
    assert path == "/night"
    assert alert["labels"]["severity"] == "critical"
    assert alert["annotations"]["summary"] == "Gateway node is down"
    query = ["amtool", "--alertmanager.url", f"http://{watched.monitoring.alertmanager}", "alert", "query"]
    shown = await trio.run_process(query, capture_stdout=True)
    assert b"GatewayDown" in shown.stdout
    # the others go on
    assert watched.nodes["scheduler"].process.poll() is None


# --- a real collector ---------------------------------------------------------------------------------


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Any]:
    """rotel, which takes OTLP by gRPC and HTTP, and passes it on to a receiver of ours."""
    rotel = pytest.importorskip("rotel")
    grpc, http = free_port(), free_port()
    with http_receiver() as (endpoint, received), (tmp_path / "rotel.log").open("wb") as log:
        process = subprocess.Popen(
            [
                str(Path(rotel.__file__).with_name("rotel-agent")),
                "start",
                f"--otlp-grpc-endpoint=127.0.0.1:{grpc}",
                f"--otlp-http-endpoint=127.0.0.1:{http}",
                "--exporter=otlp",
                f"--otlp-exporter-endpoint={endpoint}",
                "--otlp-exporter-protocol=http",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
        )
        try:
            yield {"grpc": grpc, "http/protobuf": http, "http/json": http}, received
        finally:
            process.terminate()
            process.wait(10)


async def test_a_real_collector_takes_and_passes_on_all_three_protocols(
    watched: Watched, collector: Any
) -> None:
    ports, received = collector
    system = watched.system
    sent: dict[str, str] = {}
    plans = {}
    for protocol in ports:
        name = f"gateway-{protocol.replace('/', '-')}"
        plans[name] = (protocol, system.plan_gateway(name))
        sent[system.peer_id(name, "gateway")] = protocol
    addresses = system.gateways[-len(plans) :]
    started = []
    for (name, (protocol, planned)), own in zip(plans.items(), addresses, strict=True):
        keys = {
            **planned,
            # each dials the others, which is traced
            "gateway_addresses": [one for one in addresses if one != own],
            "telemetry_endpoint": f"http://127.0.0.1:{ports[protocol]}",
            "telemetry_protocol": protocol,
            "telemetry_interval_s": 0.5,
        }
        started.append(await system.start(name, "gateway", system.write(name, "gateway", **keys)))

    def arrived() -> dict[str, set[str]]:
        return {
            kind: {sent.get(one["service.instance.id"], "nobody's") for one in received.resources(kind)}
            for kind in ("traces", "metrics", "logs")
        }

    await until(lambda: all(one >= set(ports) for one in arrived().values()), 30, lambda: str(arrived()))
    assert {one["service.name"] for one in received.resources("metrics")} == {"hypha-gateway"}
    await system.group.stop(started)
