"""The rules and configurations in deploy/, judged by Prometheus's and Alertmanager's own tools (Debian's)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
import yaml
from tests.support.monitoring import open_alertmanager
from tests.support.polling import until

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = yaml.safe_load((DEPLOY / "rules" / "hypha.rules.yml").read_text())
ALERTS = [rule["alert"] for group in RULES["groups"] for rule in group["rules"]]

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (shutil.which("promtool") and shutil.which("amtool")),
        reason="needs Debian's prometheus and prometheus-alertmanager",
    ),
]


def ran(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(one) for one in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_promtool_accepts_the_rules() -> None:
    done = ran("promtool", "check", "rules", DEPLOY / "rules" / "hypha.rules.yml")
    assert done.returncode == 0, done.stdout
    assert f"{len(ALERTS)} rules found" in done.stdout


def test_each_alert_fires_for_its_cause_and_for_nothing_else() -> None:
    done = ran("promtool", "test", "rules", DEPLOY / "rules" / "tests.yml")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "change", [{"expr": "vector(1) > 2"}, {"for": "0s"}], ids=["never fires", "fires at once"]
)
def test_the_tests_would_notice_of_each_alert_that_it(change: dict[str, str], tmp_path: Path) -> None:
    shutil.copy(DEPLOY / "rules" / "tests.yml", tmp_path)
    groups = [
        {**group, "rules": [{**rule, **change} for rule in group["rules"]]} for group in RULES["groups"]
    ]
    (tmp_path / "hypha.rules.yml").write_text(yaml.safe_dump({"groups": groups}))
    done = ran("promtool", "test", "rules", tmp_path / "tests.yml")
    assert done.returncode == 1
    unnoticed = [alert for alert in ALERTS if not re.search(rf'alertname(="|: ){alert}\b', done.stdout)]
    assert unnoticed == []


@pytest.mark.parametrize("name", ["prometheus.yml", "prometheus-otlp.yml"])
def test_promtool_accepts_the_configuration(name: str) -> None:
    done = ran("promtool", "check", "config", DEPLOY / name)
    assert done.returncode == 0, done.stdout


def test_amtool_accepts_the_configuration_and_routes_by_severity() -> None:
    config = DEPLOY / "alertmanager.yml"
    done = ran("amtool", "check-config", config)
    assert done.returncode == 0, done.stdout
    for severity, receiver in (("critical", "night"), ("warning", "day"), ("info", "day")):
        routed = ran("amtool", "config", "routes", "test", f"--config.file={config}", f"severity={severity}")
        assert routed.stdout.splitlines()[-1] == receiver


def _labels(alert: str, **labels: str) -> dict[str, str]:
    """Those that the rule gives it, and ``labels`` of its series."""
    (rule,) = (one for group in RULES["groups"] for one in group["rules"] if one["alert"] == alert)
    return {"alertname": alert, **labels, **{key: v for key, v in rule["labels"].items() if "{" not in v}}


async def test_a_twin_is_held_back_while_its_cause_is_known(tmp_path: Path) -> None:
    shutil.copy(DEPLOY / "alertmanager.yml", tmp_path)
    alerts = [
        # a scheduler is down: that its metrics are gone is no news, that a worker shows nothing of slices is
        _labels("NodeDown", component="hypha-scheduler", instance="s:1"),
        _labels("LowWorkerCountNoData"),
        _labels("SlowDataFetchNoData"),
        # one clock is wrong: whether others say theirs is asked later
        _labels("ClockSkew", component="hypha-worker", instance="w:1"),
        _labels("ClockSkewNoData"),
        _labels("DiskAlmostFullNoData"),
    ]
    held: dict[str, bool] = {}
    with open_alertmanager(tmp_path) as address:
        async with httpx.AsyncClient() as client:
            posted = await client.post(
                f"http://{address}/api/v2/alerts", json=[{"labels": one} for one in alerts]
            )
        assert posted.status_code == 200, posted.text

        def all_judged() -> bool:
            shown = httpx.get(f"http://{address}/api/v2/alerts").json()
            held.clear()
            held.update({one["labels"]["alertname"]: bool(one["status"]["inhibitedBy"]) for one in shown})
            return len(held) == len(alerts) and held["LowWorkerCountNoData"]

        await until(all_judged, 10, lambda: str(held))
    assert {name for name, back in held.items() if back} == {"LowWorkerCountNoData", "ClockSkewNoData"}
