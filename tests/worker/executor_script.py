"""A small executor in nothing but the standard library, as a stranger might write one.

``executor_script.py SOCKET MODE``; modes: ``echo`` (take part as a training executor that sends its slice
back as its update), ``gather`` (a parameter server that sends every update on as theta), ``crash``,
``peek`` (asks for the model of somebody who is not its scheduler), ``sleep`` (deaf to SIGTERM), ``pulse`` (a
parameter server with nothing to do, which says so), ``hang`` (caught in a dead loop).
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any


class Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(sys.argv[1])


def call(method: str, path: str, body: Any = None) -> Any:
    connection = Connection("bridge")
    connection.request(method, path, None if body is None else json.dumps(body))
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    if answer.status != 200:
        raise SystemExit(f"{path}: {answer.status} {content}")
    return content


def stream(method: str, path: str, body: Any = None) -> Iterator[Any]:
    connection = Connection("bridge")
    connection.request(method, path, None if body is None else json.dumps(body))
    answer = connection.getresponse()
    while line := answer.readline():
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


def say(**event: Any) -> None:
    call("POST", "/status/send", {"event": event})


def finish_when_told() -> None:
    for directive in stream("GET", "/directives"):
        if directive["type"] == "finish":
            os._exit(0)


def echo(job: dict[str, Any]) -> None:
    threading.Thread(target=finish_when_told, daemon=True).start()
    say(type="loaded", incarnation=os.path.basename(os.environ["WORK_DIR"]))
    for theta in stream("POST", "/resources/receive", {"kinds": ["theta"]}):
        round_ = theta["meta"]["stamp"].get("round", 0)
        say(type="round-started", round=round_, theta=theta["meta"]["blake3"])
        os.unlink(theta["path"])
        resource = {"type": "scheduler", "peer": job["scheduler"]["peer"], "dataset": job["dataset"]}
        (part,) = call("POST", "/resources/fetch", {"resource": resource})
        say(type="progress", round=round_, batches=1, samples=2, busy_s=0.1, loss=0.5)
        shutil.copyfile(part["path"], f"outgoing/update-{round_}")
        peers = {"type": "peers", "peers": [job["parameter_server"]], "resource": "update"}
        sent = call(
            "POST",
            "/resources/send",
            {"resource": peers, "path": f"outgoing/update-{round_}", "round": round_, "samples": 2},
        )
        print("sent", json.dumps(sent), flush=True)
        os.unlink(f"outgoing/update-{round_}")


def gather(job: dict[str, Any]) -> None:
    say(type="model-ready", round=0, theta="0", parameters=1, size_bytes=1)
    members: list[dict[str, Any]] = []

    def follow() -> None:
        for directive in stream("GET", "/directives"):
            if directive["type"] == "members":
                members[:] = directive["peers"]
            if directive["type"] == "finish":
                os._exit(0)

    threading.Thread(target=follow, daemon=True).start()
    for update in stream("POST", "/resources/receive", {"kinds": ["update"]}):
        round_ = update["meta"]["stamp"].get("round", 0)
        peers = {"type": "peers", "peers": members, "resource": "theta", "strategy": "all"}
        sent = call(
            "POST",
            "/resources/send",
            {
                "resource": peers,
                "path": update["path"],
                "round": round_ + 1,
                "contributors": [update["from_peer"]],
            },
        )
        lost = [one["peer"] for one in sent["deliveries"] if not one["acknowledged"]]
        say(type="round-applied", round=round_, theta=",".join(lost), contributors=[update["from_peer"]])
        os.unlink(update["path"])


def main() -> None:
    mode = sys.argv[2]
    if mode == "crash":
        print("something is wrong", flush=True)
        sys.exit(3)
    if mode == "peek":
        other = call("GET", "/job")["parameter_server"]
        resource = {"type": "peers", "peers": [other], "resource": "model"}
        call("POST", "/resources/fetch", {"resource": resource})
    if mode == "sleep":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say(type="loaded", incarnation=str(os.getpid()))
        time.sleep(600)
    if mode == "pulse":
        say(type="model-ready", round=0, theta=str(os.getpid()), parameters=1, size_bytes=1)
        while True:
            say(type="alive")
            time.sleep(0.1)
    if mode == "hang":
        print("about to hang", flush=True)
        say(type="loaded", incarnation=str(os.getpid()))
        say(type="alive")
        while True:
            pass
    job = call("GET", "/job")
    {"echo": echo, "gather": gather}[mode](job)


main()
