"""A real Prometheus and Alertmanager (Debian's) with the configuration of deploy/, and a webhook.

Minutes would be too long for a test. So rules wait for two seconds where they wait for minutes (``for:``) and
look back 15 seconds where they look back minutes (``[5m]``), targets are read and rules evaluated once a
second, and Alertmanager groups for as long. Nothing else of what is shipped is changed, unless a test says.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml

from hypha.cli.local.network import free_port

DEPLOY = Path(__file__).parents[2] / "deploy"
PROGRAMS = ("prometheus", "prometheus-alertmanager")
WINDOW = "15s"
_START_S = 20.0


def installed() -> bool:
    """Whether both programs are here."""
    return all(shutil.which(one) for one in PROGRAMS)


def shortened(rules: str) -> str:
    """The rules, which need seconds where the shipped ones need minutes."""
    short, waits = re.subn(r"^( +for:) \d+m$", r"\1 2s", rules, flags=re.MULTILINE)
    short, windows = re.subn(r"\[\d+m\]", f"[{WINDOW}]", short)
    assert waits >= 4
    assert windows >= 3
    return short


@dataclass
class Notices:
    """What the webhook was sent: (path, alert)."""

    alerts: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def of(self, name: str, status: str = "firing") -> list[tuple[str, dict[str, Any]]]:
        """Those of the alert ``name``."""
        return [
            (path, one)
            for path, one in list(self.alerts)
            if one["labels"]["alertname"] == name and one["status"] == status
        ]


@dataclass
class Monitoring:
    """Running; ``notices`` grow."""

    address: str
    alertmanager: str
    notices: Notices

    def query(self, promql: str) -> list[tuple[dict[str, str], float]]:
        """The instant vector that Prometheus answers with. Raises ValueError when it refuses."""
        answer = _get(self.address, "/api/v1/query?" + urlencode({"query": promql}))
        if answer["status"] != "success":
            raise ValueError(f"{promql}: {answer['error']}")
        result = answer["data"]["result"]
        if answer["data"]["resultType"] == "scalar":
            return [({}, float(result[1]))]
        return [(one["metric"], float(one["value"][1])) for one in result]


def _get(address: str, path: str) -> Any:
    connection = HTTPConnection(address, timeout=5.0)
    try:
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


@contextmanager
def webhook() -> Iterator[tuple[str, Notices]]:
    """A receiver of Alertmanager's notices at (URL)."""
    notices = Notices()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            notices.alerts += [(self.path, alert) for alert in body["alerts"]]
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", notices
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _write(root: Path, targets: Mapping[str, Sequence[str]], alertmanager: str, rules: str) -> None:
    """deploy/ as it is shipped, but for addresses and times."""
    shutil.copytree(DEPLOY / "rules", root / "rules")
    shutil.copytree(DEPLOY / "targets", root / "targets")
    (root / "rules" / "hypha.rules.yml").write_text(rules)
    for name, addresses in targets.items():
        (root / "targets" / f"{name}.yml").write_text(yaml.safe_dump([{"targets": list(addresses)}]))
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["global"] = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), "1s")
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [alertmanager]
    (root / "prometheus.yml").write_text(yaml.safe_dump(config))


def _write_routing(root: Path, hook: str) -> None:
    routing = yaml.safe_load((DEPLOY / "alertmanager.yml").read_text())
    for route in (routing["route"], *routing["route"]["routes"]):
        route |= {"group_wait": "1s", "group_interval": "1s"}
    for receiver in routing["receivers"]:
        receiver["webhook_configs"][0]["url"] = f"{hook}/{receiver['name']}"
    (root / "alertmanager.yml").write_text(yaml.safe_dump(routing))


@contextmanager
def open_alertmanager(root: Path) -> Iterator[str]:
    """Alertmanager in ``root``, with the ``alertmanager.yml`` that is there, at (address)."""
    address = f"127.0.0.1:{free_port()}"
    command = (
        "prometheus-alertmanager",
        f"--config.file={root / 'alertmanager.yml'}",
        f"--storage.path={root / 'notices'}",
        f"--web.listen-address={address}",
        "--cluster.listen-address=",
    )
    with _running(root, address, command):
        yield address


@contextmanager
def open_monitoring(root: Path, targets: Mapping[str, Sequence[str]], rules: str) -> Iterator[Monitoring]:
    """Both programs in ``root``, gone when the block ends. ``targets`` are addresses by file."""
    address = f"127.0.0.1:{free_port()}"
    root.mkdir()
    command = (
        "prometheus",
        f"--config.file={root / 'prometheus.yml'}",
        f"--storage.tsdb.path={root / 'series'}",
        f"--web.listen-address={address}",
    )
    with webhook() as (hook, notices):
        _write_routing(root, hook)
        with open_alertmanager(root) as alertmanager:
            _write(root, targets, alertmanager, rules)
            with _running(root, address, command):
                yield Monitoring(address, alertmanager, notices)


@contextmanager
def _running(root: Path, address: str, command: Sequence[str]) -> Iterator[None]:
    log = root / f"{command[0]}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=root)
    try:
        until = time.monotonic() + _START_S
        while not _ready(address):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < until, f"{command[0]} is not ready:\n{log.read_text()[-2000:]}"
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


def _ready(address: str) -> bool:
    connection = HTTPConnection(address, timeout=1.0)
    try:
        connection.request("GET", "/-/ready")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
