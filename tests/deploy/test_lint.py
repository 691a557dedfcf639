"""Rules, dashboards and documented queries fit the registry; and the lint says so when one does not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import lint, promql

DEPLOY = lint.ROOT / "deploy"
RUNBOOKS = {"slow", "quiet"}


def test_all_that_is_shipped_fits_the_registry() -> None:
    assert lint.check_all() == []


def test_the_rules_hold_the_specifications_alerts_word_for_word() -> None:
    groups = yaml.safe_load((DEPLOY / "rules" / "hypha.rules.yml").read_text())["groups"]
    rules = {rule["alert"]: rule for rule in groups[0]["rules"]}
    wanted = {
        "HighLeaseRenewalFailures": (
            '(sum(rate(hypha_lease_renewals_total{status="failure"}[5m])) /\n'
            " sum(rate(hypha_lease_renewals_total[5m]))) > 0.1\n",
            "5m",
            "Lease renewal failure rate above 10%",
        ),
        "LowWorkerCount": ("hypha_active_workers < 2", "10m", "Active worker count below threshold"),
        "SlowDataFetch": (
            "histogram_quantile(0.95,\n  rate(hypha_data_fetch_duration_bucket[5m])) > 60\n",
            "5m",
            "P95 data fetch latency above 60 seconds",
        ),
        "GatewayDown": ('up{job="hypha-gateway"} == 0', "2m", "Gateway node is down"),
    }
    for name, (expression, time, summary) in wanted.items():
        rule = rules[name]
        assert (rule["expr"], rule["for"], rule["annotations"]["summary"]) == (expression, time, summary)


def test_every_alert_is_tested() -> None:
    groups = yaml.safe_load((DEPLOY / "rules" / "hypha.rules.yml").read_text())["groups"]
    tests = (DEPLOY / "rules" / "tests.yml").read_text()
    untested = [
        rule["alert"]
        for group in groups
        for rule in group["rules"]
        if not re.search(rf'(alertname="|alertname: ){rule["alert"]}\b', tests)
    ]
    assert untested == []


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("hypha_lease_renewal_total", "there is no metric hypha_lease_renewal_total"),
        ("hypha_lease_renewals", "there is no metric hypha_lease_renewals"),
        ("hypha_data_fetch_duration", "there is no metric hypha_data_fetch_duration"),
        ('hypha_active_workers{kind="train"}', "hypha_active_workers has no label kind"),
        (
            'hypha_lease_renewals_total{status="failed"}',
            'hypha_lease_renewals_total never has status = "failed"',
        ),
        ('hypha_job_state{state=~"runn.*"}', 'hypha_job_state never has state = "runn.*"'),
        ("rate(hypha_active_workers[5m])", "rate of hypha_active_workers, which is a gauge"),
        ("increase(hypha_job_loss[5m]) > 1", "increase of hypha_job_loss, which is a gauge"),
        ("deriv(hypha_relay_bytes_total[5m])", "deriv of hypha_relay_bytes_total, which is no gauge"),
        (
            "sum by (peer) (hypha_active_workers)",
            "sum names the label peer, which its operand does not have",
        ),
        (
            "sum by (status) (sum by (job) (rate(hypha_lease_renewals_total[5m])))",
            "sum names the label status, which its operand does not have",
        ),
        (
            "histogram_quantile(0.9, sum(rate(hypha_data_fetch_duration_bucket[5m])))",
            "histogram_quantile of buckets that have lost their label le",
        ),
        (
            "histogram_quantile(0.9, rate(hypha_data_fetch_duration_count[5m]))",
            "histogram_quantile of what is no histogram's buckets",
        ),
        (
            "histogram_quantile(0.9, rate(hypha_job_samples_total[5m]) and on (job) "
            "rate(hypha_job_round_duration_bucket[5m]))",
            "histogram_quantile of what is no histogram's buckets",
        ),
        (
            "hypha_active_workers * on (peer) hypha_job_round",
            "* matches by the label peer, which not both sides have",
        ),
        (
            "hypha_active_workers * on (instance) group_left (dataset) target_info",
            "* takes over the label dataset, which the other side does not have",
        ),
        ("sum(", "it cannot be parsed: unclosed left parenthesis"),
        ('{job="hypha-worker"}', '{job="hypha-worker"} names no metric'),
    ],
)
def test_a_query_that_cannot_work_is_told(query: str, problem: str) -> None:
    assert promql.problems(query) == [problem]


@pytest.mark.parametrize(
    ("query", "labels"),
    [
        ("hypha_lease_renewals_total", {"job", "instance", "status"}),
        ("rate(hypha_data_fetch_duration_bucket[5m])", {"job", "instance", "status", "le"}),
        (
            "histogram_quantile(0.9, rate(hypha_data_fetch_duration_bucket[$__rate_interval]))",
            {"job", "instance", "status"},
        ),
        ("sum(rate(hypha_lease_renewals_total[5m]))", set()),
        (
            "histogram_quantile(1, sum by (le) (rate(hypha_job_round_duration_bucket[5m]) and on (job) up))",
            set(),
        ),
        ("sum without (instance) (hypha_job_state)", {"job", "state"}),
        ("topk(3, hypha_worker_loss)", {"job", "instance", "worker"}),
        (
            "hypha_job_round * on (job, instance) group_left (hypha_job) target_info",
            {"job", "instance", "hypha_job"},
        ),
        ("hypha_job_round / on (instance) hypha_job_rounds", {"instance"}),
        ("hypha_job_loss and on () up == 1", {"job", "instance"}),
        ('absent(hypha_uptime{job="hypha-data"})', {"job"}),
        ("1 - hypha_worker_loss", {"job", "instance", "worker"}),
        ('count_values("round", hypha_job_round)', {"round"}),
        ('label_replace(hypha_job_round, "name", "$1", "instance", "(.*)")', {"job", "instance", "name"}),
    ],
)
def test_the_labels_that_a_result_keeps_are_known(query: str, labels: set[str]) -> None:
    assert promql.problems(query) == []
    assert promql.labels_of(promql.parse(query)) == labels


def alert(**changes: Any) -> dict[str, Any]:
    made = {
        "alert": "Slow",
        "expr": "hypha_job_round_age > 60",
        "labels": {"severity": "warning"},
        "annotations": {
            "summary": "It is slow",
            "description": "{{ $labels.instance }} is slow.",
            "runbook_url": "docs/operator.md#slow",
            "no_twin": "this is a test",
        },
    }
    for key, change in changes.items():
        made[key] = {**made[key], **change} if isinstance(change, dict) else change
    return made


def checked(*rules: dict[str, Any]) -> list[str]:
    text = yaml.safe_dump({"groups": [{"name": "test", "rules": list(rules)}]})
    return list(lint.check_rules(text, RUNBOOKS))


def test_a_complete_alert_passes() -> None:
    assert checked(alert()) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"expr": "hypha_nothing > 1"}, "there is no metric hypha_nothing"),
        ({"labels": {"severity": "page"}}, "its severity is none of critical, warning, info"),
        ({"annotations": {"summary": ""}}, "it has no summary"),
        ({"annotations": {"description": ""}}, "it has no description"),
        ({"annotations": {"runbook_url": ""}}, "it has no runbook_url"),
        (
            {"annotations": {"runbook_url": "docs/operator.md#fast"}},
            "its runbook docs/operator.md#fast is no section of docs/operator.md",
        ),
        (
            {"annotations": {"runbook_url": "README.md#slow"}},
            "its runbook README.md#slow is no section of docs/operator.md",
        ),
        (
            {"annotations": {"description": '{{ $labels.worker | reReplaceAll "a" "b" }} is slow'}},
            "a template names the label worker, which its expression does not keep",
        ),
        (
            {"labels": {"severity": "info", "component": "{{ $labels.job }}"}, "expr": "sum(up) > 9"},
            "a template names the label instance, which its expression does not keep",
        ),
        (
            {"annotations": {"no_twin": ""}},
            "it has no twin SlowNoData, and no reason (no_twin) to have none",
        ),
        ({"alert": "FastNoData"}, "it is the twin of no alert"),
    ],
)
def test_an_alert_that_is_incomplete_is_told(changes: dict[str, Any], problem: str) -> None:
    assert f"{changes.get('alert', 'Slow')}: {problem}" in checked(alert(**changes))


def test_a_twin_asks_for_a_metric_of_its_alert() -> None:
    of = alert(annotations={"no_twin": ""})
    twin = alert(alert="SlowNoData", annotations={"description": "Nobody says.", "no_twin": ""})
    assert checked(of, {**twin, "expr": "absent(hypha_job_round_age)"}) == []
    for expression in ("absent(hypha_job_round)", "hypha_job_round_age == 0"):
        assert checked(of, {**twin, "expr": expression}) == [
            "SlowNoData: it asks for the absence of no metric of its alert"
        ]
    assert checked(alert(), {**twin, "expr": "absent(hypha_job_round_age)"}) == [
        "Slow: it has a twin and a reason to have none"
    ]


def board(expression: str, legend: str = "", variable: str = "label_values(hypha_uptime, job)") -> str:
    panel = {"title": "P", "targets": [{"expr": expression, "legendFormat": legend}]}
    row = {"title": "R", "panels": [panel]}
    variables = {"list": [{"name": "job", "type": "query", "query": variable}]}
    return json.dumps({"panels": [row], "templating": variables})


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (board('hypha_job_state{state="$state", job=~"$job"}', "{{state}} {{ instance }}"), []),
        (board("hypha_nothing"), ["P: there is no metric hypha_nothing"]),
        (
            board("sum(hypha_job_loss)", "{{instance}}"),
            ["P: the legend names instance, which the query does not keep"],
        ),
        (
            board("up", variable="label_values(hypha_nothing, job)"),
            ["$job: there is no metric hypha_nothing"],
        ),
        (
            board("up", variable="label_values(hypha_job_loss, worker)"),
            ["$job: hypha_job_loss has no label worker"],
        ),
        (
            board("up", variable="metrics(hypha_.*)"),
            ["$job: its query is no label_values(metric, label)"],
        ),
    ],
)
def test_a_dashboard_is_checked(text: str, problems: list[str]) -> None:
    assert list(lint.check_dashboard(text)) == problems


def test_a_page_is_checked_block_by_block() -> None:
    page = (
        "```promql\nup == 0\n```\n\n```sh\nhypha_nothing\n```\n\n```promql\n# a comment\nhypha_nothing\n```\n"
    )
    assert list(lint.check_page(page)) == ["# a comment: there is no metric hypha_nothing"]


def test_a_section_is_linked_to_as_its_page_does() -> None:
    found = lint.anchors("# When something fails\n\n## `warm = false`, or not?\n### GatewayDown\n")
    assert found == {"when-something-fails", "warm--false-or-not", "gatewaydown"}


def test_the_command_tells_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for directory in ("docs", "deploy/rules", "deploy/dashboards"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "docs" / "operator.md").write_text("# Slow\n```promql\nhypha_nothing\n```\n")
    (tmp_path / "README.md").write_text("")
    assert lint.main([str(tmp_path)]) == 1
    assert "docs/operator.md: hypha_nothing: there is no metric hypha_nothing" in capsys.readouterr().out
