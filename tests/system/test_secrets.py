"""No secret is in any line of a whole run, whatever level is asked for, nor in what the run leaves behind."""

from __future__ import annotations

import base64
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.sinks.endpoints import hanging
from tests.support.hub import Hub, Repository
from tests.support.system import SMALL, System, digits_dataset, digits_job, digits_model, paced

from hypha.executor.models import loading as models
from hypha.messages import ModelSpec

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]

#: Hypha and every library that could say something of a token
EVERYTHING = (
    "trace,httpx=debug,httpcore=debug,huggingface_hub=debug,hypercorn=debug,libp2p=debug,opentelemetry=debug,"
    "urllib3=debug,fsspec=debug,filelock=debug,transformers=debug"
)
OF_THE_MODEL, OF_THE_OUTPUT = "hf-model-0123456789abcdef", "hf-output-0123456789abcdef"
WRONG = "hf-wrong-0123456789abcdef"
OF_SINKS, OF_TELEMETRY = "sink-0123456789abcdef", "telemetry-0123456789abcdef"


def keys(pki: Path) -> Iterator[tuple[str, bytes]]:
    """Every private key, as it is in its file and as it would be printed."""
    for path in pki.rglob("*-key.pem"):
        loaded = serialization.load_pem_private_key(path.read_bytes(), None)
        raw = serialization.Encoding.Raw, serialization.PrivateFormat.Raw
        secret = loaded.private_bytes(*raw, serialization.NoEncryption())  # type: ignore[arg-type]
        yield path.name, secret
        yield path.name, secret.hex().encode()
        yield path.name, base64.b64encode(secret)
        yield path.name, path.read_bytes().splitlines()[1]


async def test_no_secret_in_any_line(system: System, tmp_path: Path) -> None:
    source, spec = digits_model(tmp_path), ModelSpec(task="image-classification", seed=5)
    models.export(models.build(spec, source), spec, None, tmp_path / "pretrained")
    files = {path.name: path.read_bytes() for path in (tmp_path / "pretrained").iterdir()}
    repository = Repository([files], writer=OF_THE_MODEL, private=True)
    hub = Hub({"acme/resnet": repository}, users={OF_THE_OUTPUT: "ada"})
    with hub.serve() as address, hanging() as port:
        nowhere = f"http://127.0.0.1:{port}"
        telemetry = {"telemetry_endpoint": nowhere, "telemetry_headers": {"Authorization": OF_TELEMETRY}}
        system.group.environment.update(HF_HUB_OFFLINE="0", HF_ENDPOINT=address, HF_HUB_DISABLE_XET="1")
        system.group.environment["HYPHA_LOG"] = EVERYTHING
        gateway = await system.gateway(planned=system.plan_gateway() | telemetry)
        data = await system.data("data", digits_dataset(tmp_path), **telemetry)
        worker = await system.worker("worker", **telemetry)
        model = {"type": "image-classification", "repository": "acme/resnet", "token": OF_THE_MODEL}
        job = digits_job(None, 1, 2) | {"model": model}
        job |= {"output": "hf://ada/digits", "output_token": OF_THE_OUTPUT}
        sinks = [{"type": "tensorboard"}, {"type": "http", "url": nowhere, "token": OF_SINKS}]
        root = {"scheduler": {"job": job, "sinks": sinks}, **telemetry}
        scheduler = await system.scheduler(job, **root)
        assert await system.ended(scheduler) == 0, scheduler.tail()
        # what went wrong is told as well
        refused = {"job": job | {"name": "wrong", "output_token": WRONG}}
        failing = await system.scheduler(job, name="failing", **{**root, "scheduler": refused})
        assert await system.ended(failing) == 6
        assert "401" in failing.tail()
        for node in (worker, data, gateway):
            node.process.send_signal(signal.SIGTERM)
            await system.ended(node)

    text = scheduler.log.read_text() + worker.log.read_text()
    assert '"level": "trace"' in text or '"level": "debug"' in text
    assert "Round 2 of 2 was applied" in text, scheduler.tail()
    tokens = (OF_THE_MODEL, OF_THE_OUTPUT, WRONG, OF_SINKS, OF_TELEMETRY)
    secrets = [(token, token.encode()) for token in tokens]
    secrets += keys(system.pki)
    own = {tmp_path / f"{node}.toml" for node in (*system.roles,)}
    found = [
        (str(path.relative_to(tmp_path)), name)
        for path in tmp_path.rglob("*")
        if path.is_file() and path not in own and not path.is_relative_to(system.pki)
        for name, secret in secrets
        if secret in path.read_bytes()
    ]
    assert found == []
    _entries_carry_what_they_are_about(worker.log, system.peer_id("worker", "worker"))


def _entries_carry_what_they_are_about(log: Path, worker: str) -> None:
    """Every line of a worker is one JSON entry, and those of an executor say whose it is."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert all(entry["component"] == "hypha-worker" for entry in entries)
    (started, *_) = (one for one in entries if one["message"].startswith("Starting the executor"))
    assert (started["worker_peer_id"], started["job_id"][:4]) == (worker, "job-")
    assert started["lease_id"]
    output = [one for one in entries if one["logger"] == "hypha.worker.executor"]
    assert output
    assert all(one["job_id"] and one["worker_peer_id"] == worker for one in output)


async def test_a_sink_that_hangs_does_not_hold_up_the_job_or_its_end(system: System, tmp_path: Path) -> None:
    with hanging() as port:
        await system.gateway()
        await system.data("data", digits_dataset(tmp_path))
        server = {"class": "aggregate", "name": "parameter-server"}
        await system.worker("worker", executors=[paced(0.02), server])
        job = digits_job(None, 1, 1000) | {"model": SMALL}
        sinks = [{"type": "tensorboard"}, {"type": "http", "url": f"http://127.0.0.1:{port}"}]
        scheduler = await system.scheduler(job, scheduler={"job": {"output": "out", **job}, "sinks": sinks})
        await system.reached(scheduler, lambda seen: seen.round >= 4)
        job_id = (await system.status(scheduler)).job_id
        began = time.monotonic()
        scheduler.process.terminate()
        assert await system.ended(scheduler) == 128 + signal.SIGTERM
        assert time.monotonic() - began < 5
    read = EventAccumulator(str(tmp_path / "state" / "job" / "sinks" / "tensorboard" / job_id))
    read.Reload()
    rounds = [one.step for one in read.Scalars("loss")]
    assert rounds[:4] == [1, 2, 3, 4]
    assert rounds == list(range(1, len(rounds) + 1))
    assert len([tag for tag in read.Tags()["scalars"] if tag.startswith("loss/12D3KooW")]) == 1
