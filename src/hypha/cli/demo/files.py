"""The files of a demo: a throw-away PKI, the digits as NumPy files, the model's configuration, all TOML."""

from __future__ import annotations

import errno
import json
import random
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from hypha.pki.authority import CaFiles, make_node, make_org, make_root

DATASET = "digits"
LABELS = 10
HOLDOUT = 0.2
SLICE_SAMPLES = 60
#: outgoing connections have ports from 32768 on (net.ipv4.ip_local_port_range)
_PORTS = (20_000, 32_000)

#: A ResNet (He et al. 2015) small enough for 8 x 8 pixels; 79,000 parameters, with BatchNorm buffers.
MODEL = {
    "architectures": ["ResNetForImageClassification"],
    "model_type": "resnet",
    "num_channels": 1,
    "embedding_size": 32,
    "hidden_sizes": [32, 64],
    "depths": [1, 1],
    "layer_type": "basic",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "id2label": {str(label): str(label) for label in range(LABELS)},
    "label2id": {str(label): label for label in range(LABELS)},
}


@dataclass(frozen=True)
class DemoFiles:
    """Where everything of a demo is."""

    root: Path

    def __getitem__(self, name: str) -> Path:
        return self.root / name

    def config(self, name: str) -> Path:
        """A component's TOML file."""
        return self.root / f"{name}.toml"


@dataclass(frozen=True)
class DemoJob:
    """What the demo trains."""

    workers: int
    rounds: int
    samples_a_round: int = 1440
    batch_size: int = 16
    seed: int = 0


def make_certificates(place: DemoFiles, workers: int) -> None:
    """Root, organisation and one certificate a node, each with its role. Blocks."""
    pki = place["pki"]
    root = make_root("Demo", pki)
    organisation = make_org("Demo Lab", CaFiles(root.cert, root.key), pki)
    ca = CaFiles(organisation.cert, organisation.key, organisation.trust)
    roles = {"gateway": "gateway", "data": "data", "scheduler": "scheduler"}
    roles |= {worker_name(number): "worker" for number in range(workers)}
    for name, role in roles.items():
        make_node(name, ca, pki, roles=[role])


def worker_name(number: int) -> str:
    """``worker-1`` and so on."""
    return f"worker-{number + 1}"


def write_digits(place: DemoFiles, copies: int = 1) -> None:
    """scikit-learn's digits (1797 images of 8 x 8) as the arrays a Hugging Face classifier takes, ``copies``
    times. Blocks.
    """
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    raw = place["raw"]
    raw.mkdir()
    # 0..16 -> 0..1, and a channel axis
    pixels = (digits.images[:, None] / 16.0).astype(np.float32)
    np.save(raw / "pixel_values.npy", np.concatenate([pixels] * copies))
    np.save(raw / "labels.npy", np.concatenate([digits.target.astype(np.int64)] * copies))


def write_model(place: DemoFiles) -> None:
    """A directory with a config.json and no weights: those come from training."""
    place["untrained"].mkdir()
    (place["untrained"] / "config.json").write_text(json.dumps(MODEL, indent=2))


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of ``host`` that is free right now: none that Linux gives to outgoing connections, one of
    which might have it before somebody listens there.
    """
    while True:
        port = random.randrange(*_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE:
                    raise
            else:
                return port


def write_gateway(place: DemoFiles, port: int) -> None:
    """Its configuration; the others need its address, so it takes a known port."""
    address = f"/ip4/127.0.0.1/tcp/{port}"
    _write(place, "gateway", {"listen_addresses": [address], "external_addresses": [address]})


def write_leaves(place: DemoFiles, gateway: str, job: DemoJob, warm: Mapping[str, Any]) -> None:
    """Configurations of the data node, the workers (with the keys ``warm``) and the scheduler."""
    network: dict[str, Any] = {
        "gateway_addresses": [gateway],
        "listen_addresses": ["/ip4/127.0.0.1/tcp/0"],
    }
    _write(place, "data", {**network, "dataset_path": "dataset"})
    for number in range(job.workers):
        name = worker_name(number)
        # room for a training job and a parameter server
        offered = {"cpu": 2, "memory": 8, "storage": 2, "gpu": 0}
        # each plays a machine of its own, and all of them are on one
        mine = {"work_dir": name, "resources": offered, "detect_resources": False}
        _write(place, name, {**network, **mine, **warm})
    _write(
        place,
        "scheduler",
        {
            **network,
            "http_address": "127.0.0.1:0",
            "state_dir": "state",
            "scheduler": {"job": _job(job)},
        },
    )


def _job(job: DemoJob) -> dict[str, Any]:
    needs = {"cpu": 1, "memory": 2, "storage": 0, "gpu": 0}
    return {
        "name": "digits",
        "model": {"type": "image-classification", "path": "untrained", "seed": job.seed},
        "dataset": {"dataset": DATASET},
        "rounds": {
            "update_rounds": job.rounds,
            "avg_samples_between_updates": job.samples_a_round,
            "batch_size": job.batch_size,
        },
        "inner_optimizer": {"learning_rate": 2e-3},
        # a job of ten rounds is over before 0.9 has paid off
        "outer_optimizer": {"learning_rate": 0.7, "momentum": 0.5},
        "resources": {"num_workers": job.workers, "worker": needs, "parameter_server": needs},
        "seed": job.seed,
        # what is made here goes together; the cores are busy enough with everybody's start
        "check": "quick",
        "output": "model",
    }


def _write(place: DemoFiles, name: str, keys: dict[str, Any]) -> None:
    identity = {f"{kind}_pem": f"pki/{name}-{kind}.pem" for kind in ("cert", "key", "trust")}
    config = {**identity, "exclude_cidr": [], **keys}
    place.config(name).write_text(tomli_w.dumps(config))
