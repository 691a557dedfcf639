"""Models from a hub and results to one, checkpoints in a bucket: whole networks, real protocols."""

from __future__ import annotations

import json
from pathlib import Path

import boto3
import pytest
from safetensors.numpy import load_file
from tests.support.bucket import s3_server
from tests.support.hub import Hub, Repository
from tests.support.system import System, digits_dataset, digits_job, digits_model

from hypha.executor.models import loading as models
from hypha.messages import LedgerRound, ModelSpec

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]


def pretrained(root: Path) -> Path:
    """A model with weights and a head for five labels, as ``save_pretrained`` writes it."""
    labels = {str(number): str(number) for number in range(5)}
    source = digits_model(root, id2label=labels)
    spec = ModelSpec(task="image-classification", seed=5)
    models.export(models.build(spec, source), spec, None, root / "pretrained")
    return root / "pretrained"


async def test_a_pretrained_model_of_the_hub_gets_a_fresh_head_and_goes_back(
    system: System, tmp_path: Path
) -> None:
    dataset, source = digits_dataset(tmp_path), pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    hub = Hub({"acme/resnet": Repository([files], writer="right", private=True)}, users=("ada",))
    with hub.serve() as address:
        system.group.environment.update(HF_HUB_OFFLINE="0", HF_ENDPOINT=address, HF_HUB_DISABLE_XET="1")
        await system.gateway()
        await system.data("data", dataset)
        workers = [await system.worker(f"worker-{number}") for number in range(2)]
        model = {"type": "image-classification", "repository": "acme/resnet", "token": "right"}
        model |= {"arguments": {"num_labels": 10}}
        job = digits_job(tmp_path, 2, 5, output="hf://ada/digits", output_token="ada") | {"model": model}
        scheduler = await system.scheduler(job)
        assert await system.ended(scheduler) == 0, scheduler.tail()

    # everybody starts from the same theta: another one would have been an error
    assert "another theta" not in scheduler.log.read_text()
    pushed = hub.repositories["ada/digits"]
    assert {"config.json", "model.safetensors", "hypha.json"} <= set(pushed.files)
    assert len(json.loads(pushed.files["config.json"])["id2label"]) == 10
    out = tmp_path / "model"
    out.mkdir()
    for name, data in pushed.files.items():
        (out / name).write_bytes(data)
    assert load_file(out / "model.safetensors")["classifier.1.weight"].shape[0] == 10
    # the replay builds theta of round 0 from the weights and the seed by itself
    assert await system.replay("job", dataset, source) <= 1e-5
    _, ledger = system.ledger("job")
    assert len(ledger.rounds) == 5
    for text in [path.read_text() for path in (tmp_path / "state" / "job" / "ledger.json", scheduler.log)]:
        assert '"right"' not in text, "a token was written down"
    assert all("right" not in worker.log.read_text() for worker in workers)


async def test_a_job_goes_on_from_the_last_good_checkpoint_in_a_bucket(
    system: System, tmp_path: Path
) -> None:
    dataset = digits_dataset(tmp_path)
    with s3_server() as (bucket, environment):
        system.group.environment.update(environment)
        await system.gateway()
        await system.data("data", dataset)
        places = [f"{bucket}/checkpoints*"]
        allow = {"local_read": places, "local_write": places}
        workers = [await system.worker(f"worker-{number}", allow=allow) for number in range(2)]
        job = digits_job(None, 2, 12, output=f"{bucket}/digits")
        job["checkpoint"] = {"every_rounds": 2, "keep": 2, "place": f"{bucket}/checkpoints"}
        job["rounds"]["avg_samples_between_updates"] = 960
        scheduler = await system.scheduler(job)
        await system.reached(scheduler, lambda seen: seen.checkpoint is not None and seen.checkpoint >= 6)
        scheduler.process.kill()
        await scheduler.process.wait()
        # within its leases it would go on with the executors that run, and restore nothing
        for worker in workers:
            await system.logged(worker, "A lease ended")

        s3 = boto3.client(
            "s3",
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            region_name=environment["AWS_DEFAULT_REGION"],
            aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        )
        name = bucket.removeprefix("s3://")
        keys = [entry["Key"] for entry in s3.list_objects_v2(Bucket=name, Prefix="checkpoints/")["Contents"]]
        rounds = sorted({int(key.split("/")[2]) for key in keys})
        assert len(rounds) == 2, f"two are to be kept: {keys}"
        damaged = next(key for key in keys if key.endswith(f"/{rounds[-1]}/theta.safetensors"))
        data = bytearray(s3.get_object(Bucket=name, Key=damaged)["Body"].read())
        data[-1] ^= 1
        s3.put_object(Bucket=name, Key=damaged, Body=bytes(data))

        again = await system.start("scheduler+1", "scheduler", tmp_path / "scheduler.toml")
        await system.logged(again, f"The checkpoint for round {rounds[-1]} in ")
        assert await system.ended(again) == 0, again.tail()
        out = tmp_path / "model"
        out.mkdir()
        for file in ("model.safetensors", "config.json", "hypha.json"):
            (out / file).write_bytes(s3.get_object(Bucket=name, Key=f"digits/{file}")["Body"].read())
        s3.close()

    _, ledger = system.ledger("job")
    counted: list[LedgerRound] = [entry for entry in ledger.rounds if not entry.discarded]
    assert [entry.round for entry in counted] == list(range(12))
    # what came after the good one was done again, in the life that restored it
    again_done = {entry.round for entry in counted if entry.generation == counted[-1].generation}
    assert min(again_done) == rounds[0]
    assert await system.replay("job", dataset, None) <= 1e-5
