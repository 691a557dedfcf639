"""Prices and bids in a configuration: every number is judged, and each problem is told where it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.config.test_loading import GOOD, problems, write

from hypha.config.models import SchedulerConfig, WorkerConfig
from hypha.config.reading.loading import load_config


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("offer.price = -1", "offer.price: "),
        ("offer.price = inf", "offer.price: "),
        ("offer.floor = nan", "offer.floor: "),
        ("offer.price = 1e13", "offer.price: "),
        ('offer.strategy = "cheapest"', "offer.strategy: "),
        ("offer.ageing_s = 0", "offer.ageing_s: "),
        ("offer.keep_after_s = -1", "offer.keep_after_s: "),
        ("offer.utilization = { high = 1.5 }", "offer.utilization.high: "),
        ("offer.utilization = { least = 2 }", "offer.utilization.least: "),
        ("offer.utilization = { most = 0.5 }", "offer.utilization.most: "),
        ("offer.utilization = { step = 0 }", "offer.utilization.step: "),
        ("offer.utilization = { every_s = 0 }", "offer.utilization.every_s: "),
        (
            "offer.utilization = { low = 0.8, high = 0.8 }",
            "offer.utilization.low: it must be less than high (0.8):",
        ),
        ("offer.affinity = { preference = 0.5 }", "offer.affinity.preference: "),
        (
            'offer.affinity = { schedulers = ["gpu-farm"] }',
            "offer.affinity.schedulers[0]: 'gpu-farm' is no PeerID, such as 12D3KooW...",
        ),
    ],
)
def test_terms_that_make_no_sense_are_refused_at_their_line(tmp_path: Path, line: str, told: str) -> None:
    [problem] = problems(WorkerConfig, write(tmp_path, GOOD + line + "\n"))
    assert problem.startswith(f"config.toml:5: {told}")


@pytest.mark.parametrize(
    ("price", "key"),
    [
        ("bid = -1", "bid"),
        ("max = 1e13", "max"),
        ("bid = nan", "bid"),
        ("raise_after_s = 0", "raise_after_s"),
        ("raise_by = 0", "raise_by"),
        ("raise_by = 1.1", "raise_by"),
    ],
)
def test_bids_that_make_no_sense_are_refused(tmp_path: Path, price: str, key: str) -> None:
    text = f"""\
[scheduler.job]
output = "out"
model = {{ type = "torch", entrypoint = "m:f" }}
dataset = {{ dataset = "d" }}
rounds = {{ inner_steps = 1 }}
resources = {{ worker_price = {{ {price} }} }}
"""
    [problem] = problems(SchedulerConfig, write(tmp_path, GOOD + text))
    assert problem.startswith(f"config.toml:10: scheduler.job.resources.worker_price.{key}: ")


def test_a_configuration_of_before_means_what_it_meant(tmp_path: Path) -> None:
    text = 'offer = { price = 2.0, floor = 0.5, strategy = "whole", lease_s = 30 }\n'
    offer = load_config(WorkerConfig, write(tmp_path, GOOD + text), environ={}).offer
    assert (offer.price, offer.floor, offer.strategy, offer.counter) == (2.0, 0.5, "whole", True)
