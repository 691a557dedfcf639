"""``python -m deploy.lint``: do rules, dashboards and documented queries fit the metrics that there are?

Every query is checked (:mod:`deploy.promql`). Beyond that every alert has a severity, a summary, a
description and a runbook that is a section of docs/operator.md; its templates name labels that its expression
keeps; and where the metric itself may go missing it has a twin, ``<Alert>NoData``, that asks with
``absent()`` for one of the alert's metrics. An alert without one gives its reason in the annotation
``no_twin``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from deploy import promql

ROOT = Path(__file__).parent.parent
TWIN = "NoData"
SEVERITIES = ("critical", "warning", "info")
RUNBOOKS = "docs/operator.md"
_TEMPLATE = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_LABEL = re.compile(r"\$labels\.(\w+)")
_LEGEND = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_BLOCK = re.compile(r"^```promql\n(.*?)^```", re.DOTALL | re.MULTILINE)
_HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
_VALUES = re.compile(r"label_values\((?:(?P<query>.+),\s*)?(?P<label>\w+)\)")


def anchors(markdown: str) -> set[str]:
    """The fragments by which the headings can be linked to."""
    return {
        re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        for heading in _HEADING.findall(markdown)
    }


def check_rules(text: str, runbooks: set[str]) -> Iterator[str]:
    """Problems of a file of rules; ``runbooks`` are the sections that there are."""
    rules = [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]
    alerts = {rule["alert"]: rule for rule in rules if "alert" in rule}
    for rule in rules:
        name = rule.get("alert") or rule.get("record")
        found = promql.problems(rule["expr"])
        yield from (f"{name}: {problem}" for problem in found)
        if "alert" in rule and not found:
            yield from (f"{name}: {problem}" for problem in _alert_problems(rule, alerts, runbooks))


def _alert_problems(rule: Any, alerts: dict[str, Any], runbooks: set[str]) -> Iterator[str]:
    name, notes, labels = rule["alert"], rule.get("annotations", {}), rule.get("labels", {})
    if labels.get("severity") not in SEVERITIES:
        yield f"its severity is none of {', '.join(SEVERITIES)}"
    for needed in ("summary", "description", "runbook_url"):
        if not notes.get(needed):
            yield f"it has no {needed}"
    page, _, section = notes.get("runbook_url", "").partition("#")
    if notes.get("runbook_url") and (page != RUNBOOKS or section not in runbooks):
        yield f"its runbook {page}#{section} is no section of {RUNBOOKS}"
    tree = promql.parse(rule["expr"])
    kept = promql.labels_of(tree)
    for text in [*notes.values(), *labels.values()]:
        for template in _TEMPLATE.findall(str(text)):
            for label in _LABEL.findall(template):
                if label not in kept:
                    yield f"a template names the label {label}, which its expression does not keep"
    yield from _twin_problems(name, tree, notes, alerts)


def _twin_problems(name: str, tree: Any, notes: Any, alerts: dict[str, Any]) -> Iterator[str]:
    if name.endswith(TWIN):
        of = alerts.get(name.removesuffix(TWIN))
        if of is None:
            yield "it is the twin of no alert"
        elif not promql.absent_metrics(tree) & promql.metrics_of(promql.parse(of["expr"])):
            yield "it asks for the absence of no metric of its alert"
    elif f"{name}{TWIN}" not in alerts and not notes.get("no_twin"):
        yield f"it has no twin {name}{TWIN}, and no reason (no_twin) to have none"
    elif f"{name}{TWIN}" in alerts and notes.get("no_twin"):
        yield "it has a twin and a reason to have none"


def check_dashboard(text: str) -> Iterator[str]:
    """Problems of a dashboard's queries, legends and variables."""
    board = json.loads(text)
    for panel in _panels(board):
        for target in panel.get("targets", ()):
            if "expr" not in target or target.get("datasource", {}).get("type") == "loki":
                continue
            found = promql.problems(target["expr"])
            yield from (f"{panel['title']}: {problem}" for problem in found)
            if not found:
                kept = promql.labels_of(promql.parse(target["expr"]))
                for label in _LEGEND.findall(target.get("legendFormat", "")):
                    if label not in kept:
                        yield f"{panel['title']}: the legend names {label}, which the query does not keep"
    for variable in board.get("templating", {}).get("list", ()):
        if variable["type"] == "query":
            yield from (f"${variable['name']}: {one}" for one in _variable_problems(variable["query"]))


def _panels(board: Any) -> Iterator[Any]:
    for panel in board.get("panels", ()):
        yield panel
        yield from panel.get("panels", ())


def _variable_problems(query: Any) -> Iterator[str]:
    match = _VALUES.fullmatch(query if isinstance(query, str) else query["query"])
    if match is None:
        yield "its query is no label_values(metric, label)"
        return
    found = promql.problems(match["query"])
    yield from found
    if not found and match["label"] not in promql.labels_of(promql.parse(match["query"])):
        yield f"{match['query']} has no label {match['label']}"


def check_page(text: str) -> Iterator[str]:
    """Problems of the ``promql`` blocks of a page; a block holds one query, comments aside."""
    for block in _BLOCK.findall(text):
        yield from (f"{block.strip().splitlines()[0]}: {problem}" for problem in promql.problems(block))


def check_all(root: Path = ROOT) -> list[str]:
    """All problems there are, each with its file."""
    found = []
    runbooks = anchors((root / RUNBOOKS).read_text())
    for path in sorted((root / "deploy" / "rules").glob("*.rules.yml")):
        found += [f"{path.relative_to(root)}: {one}" for one in check_rules(path.read_text(), runbooks)]
    for path in sorted((root / "deploy" / "dashboards").glob("*.json")):
        found += [f"{path.relative_to(root)}: {one}" for one in check_dashboard(path.read_text())]
    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        found += [f"{path.relative_to(root)}: {one}" for one in check_page(path.read_text())]
    return found


def main(argv: Sequence[str] = ()) -> int:
    """Print all problems; exit code 1 when there are any."""
    found = check_all(Path(argv[0]) if argv else ROOT)
    print("\n".join(found) or "All queries fit the registry, all alerts are complete.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
