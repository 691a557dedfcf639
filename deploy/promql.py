"""What is wrong with a PromQL query, told before a night in which nothing fires.

A query is held against the registry of metrics (:mod:`hypha.telemetry.instruments`): series, labels and label
values must exist, counters and gauges be used as what they are, and quantiles be taken of buckets that are
still there. :func:`labels_of` says which labels a result has, so that templates can be checked too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import promql_parser

from hypha.telemetry import instruments  # noqa: F401 - declares all of them
from hypha.telemetry.metrics import OTHER, Instrument

#: what Prometheus itself, or a collector, gives each series
TARGET = frozenset({"job", "instance"})
#: of the resource attributes; what an operator adds in ``[telemetry_attributes]`` is not known here
RESOURCE = frozenset(
    {
        "hypha_job",
        "service_name",
        "service_version",
        "service_instance_id",
        "service_namespace",
        "deployment_environment",
    }
)
#: for queries only: variables of Grafana that stand for a duration
DURATIONS = re.compile(r"\$(__rate_interval|__interval|__range|\{__rate_interval\}|\{__range\})")
#: for counters
RATES = frozenset({"rate", "irate", "increase", "resets"})
#: for gauges
CHANGES = frozenset({"delta", "idelta", "deriv", "predict_linear", "double_exponential_smoothing"})
KEEP_ALL = frozenset({"topk", "bottomk", "limitk", "limit_ratio"})
WITHOUT_LABELS = frozenset({"scalar", "time", "vector", "pi"})


@dataclass(frozen=True)
class Series:
    """A series' ``kind`` (counter, gauge, bucket) and labels, with the values of those that are bounded."""

    kind: str
    labels: frozenset[str]
    values: Mapping[str, frozenset[str]] = field(default_factory=dict)


def label_name(name: str) -> str:
    """What Prometheus calls an attribute."""
    return name.replace(".", "_")


def vocabulary() -> dict[str, Series]:
    """All series that there are, by name."""
    known = {
        "up": Series("gauge", TARGET),
        "target_info": Series("gauge", TARGET | RESOURCE),
        "ALERTS": Series("gauge", TARGET | {"alertname", "alertstate", "severity", "subject", "component"}),
    }
    for one in Instrument.declared.values():
        labels = TARGET | {label_name(label.name) for label in one.labels}
        values = {
            label_name(label.name): frozenset({*label.values, OTHER}) for label in one.labels if label.values
        }
        name = one.prometheus_name
        if one.kind == "histogram":
            known[f"{name}_bucket"] = Series("bucket", labels | {"le"}, values)
            known[f"{name}_sum"] = known[f"{name}_count"] = Series("counter", labels, values)
        else:
            known[name] = Series(one.kind, labels, values)
    return known


SERIES = vocabulary()


def parse(query: str) -> Any:
    """The query's tree, Grafana's durations replaced. Raises ValueError."""
    return promql_parser.parse(DURATIONS.sub("5m", query))


def selectors(tree: Any) -> list[Any]:
    """All vector selectors in it, those of ranges included."""
    found = []

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        for child in _children(node):
            visit(child)

    visit(tree)
    return found


def metrics_of(tree: Any) -> set[str]:
    """Names of the series that the query reads."""
    return {one.name for one in selectors(tree) if one.name}


def absent_metrics(tree: Any) -> set[str]:
    """Names of the series whose absence the query asks for."""
    found: set[str] = set()
    for node in _walk(tree):
        if isinstance(node, promql_parser.Call) and node.func.name in ("absent", "absent_over_time"):
            found |= metrics_of(node)
    return found


def labels_of(node: Any) -> frozenset[str]:
    """The labels that the result may have."""
    if isinstance(node, promql_parser.VectorSelector):
        series = SERIES.get(node.name or "")
        return series.labels if series else frozenset()
    if isinstance(node, promql_parser.MatrixSelector):
        return labels_of(node.vector_selector)
    if isinstance(node, promql_parser.AggregateExpr):
        return _aggregated(node)
    if isinstance(node, promql_parser.BinaryExpr):
        return _combined(node)
    if isinstance(node, promql_parser.Call):
        return _called(node)
    inner = getattr(node, "expr", None)
    return labels_of(inner) if inner is not None else frozenset()


def _aggregated(node: Any) -> frozenset[str]:
    op, had = str(node.op), labels_of(node.expr)
    if op in KEEP_ALL:
        return had
    added = frozenset({node.param.val}) if op == "count_values" else frozenset()
    if node.modifier is None:
        return added
    named = frozenset(node.modifier.labels)
    kept = had & named if node.modifier.type == promql_parser.AggModifierType.By else had - named
    return kept | added


def _combined(node: Any) -> frozenset[str]:
    left, right, op = labels_of(node.lhs), labels_of(node.rhs), str(node.op)
    if op in ("and", "unless"):
        return left
    if op == "or":
        return left | right
    if not _is_vector(node.lhs):
        return right
    if not _is_vector(node.rhs) or node.modifier is None:
        return left
    card, extra = node.modifier.card, frozenset(node.modifier.group_labels or ())
    if card == promql_parser.VectorMatchCardinality.ManyToOne:
        return left | extra
    if card == promql_parser.VectorMatchCardinality.OneToMany:
        return right | extra
    matching = node.modifier.matching
    if matching is None:
        return left
    named = frozenset(matching.labels)
    return left & named if matching.type == promql_parser.LabelModifierType.Include else left - named


def _called(node: Any) -> frozenset[str]:
    name, args = node.func.name, list(node.args)
    if name in WITHOUT_LABELS:
        return frozenset()
    if name in ("absent", "absent_over_time"):
        equal = promql_parser.MatchOp.Equal
        matchers = [one for selector in selectors(args[0]) for one in selector.matchers.matchers]
        return frozenset(one.name for one in matchers if one.op == equal)
    vector = next((one for one in args if _is_vector(one)), None)
    had = labels_of(vector) if vector is not None else frozenset()
    if name == "histogram_quantile":
        return had - {"le"}
    if name in ("label_replace", "label_join"):
        return had | {args[1].val}
    return had


def _is_vector(node: Any) -> bool:
    return bool(selectors(node)) and not (
        isinstance(node, promql_parser.Call) and node.func.name in ("scalar", "time")
    )


def _valued(node: Any) -> Any:
    """What gives the values, where the rest only says for which series."""
    while not isinstance(node, promql_parser.VectorSelector | promql_parser.MatrixSelector):
        if isinstance(node, promql_parser.BinaryExpr):
            if str(node.op) not in ("and", "unless"):
                return node
            node = node.lhs
        elif len(inner := _children(node)) == 1:
            node = inner[0]
        else:
            return node
    return node


def _children(node: Any) -> list[Any]:
    if isinstance(node, promql_parser.MatrixSelector):
        return [node.vector_selector]
    if isinstance(node, promql_parser.BinaryExpr):
        return [node.lhs, node.rhs]
    if isinstance(node, promql_parser.Call):
        return list(node.args)
    inner = getattr(node, "expr", None)
    return [inner] if inner is not None else []


def _walk(node: Any) -> Iterator[Any]:
    yield node
    for child in _children(node):
        yield from _walk(child)


def problems(query: str) -> list[str]:
    """What is wrong with the query, one sentence each; none when it is well."""
    try:
        tree = parse(query)
    except ValueError as exc:
        return [f"it cannot be parsed: {exc}"]
    return [problem for node in _walk(tree) for problem in _problems_at(node)]


def _problems_at(node: Any) -> Iterator[str]:
    if isinstance(node, promql_parser.VectorSelector):
        yield from _selector_problems(node)
    elif isinstance(node, promql_parser.Call):
        yield from _call_problems(node)
    elif isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
        had = labels_of(node.expr)
        for name in node.modifier.labels:
            if name not in had:
                yield f"{node.op} names the label {name}, which its operand does not have"
    elif isinstance(node, promql_parser.BinaryExpr) and node.modifier is not None:
        yield from _matching_problems(node)


def _selector_problems(node: Any) -> Iterator[str]:
    if node.name is None:
        yield f"{node} names no metric"
        return
    series = SERIES.get(node.name)
    if series is None:
        yield f"there is no metric {node.name}"
        return
    for matcher in node.matchers.matchers:
        if matcher.name not in series.labels:
            yield f"{node.name} has no label {matcher.name}"
        elif (known := series.values.get(matcher.name)) and "$" not in matcher.value:
            exact = matcher.op in (promql_parser.MatchOp.Equal, promql_parser.MatchOp.NotEqual)
            pattern = re.escape(matcher.value) if exact else matcher.value
            if not any(re.fullmatch(pattern, value) for value in known):
                yield f'{node.name} never has {matcher.name} = "{matcher.value}"'


def _call_problems(node: Any) -> Iterator[str]:
    name = node.func.name
    direct = [one for one in node.args if isinstance(one, promql_parser.MatrixSelector)]
    kinds = [(one.vector_selector.name, SERIES.get(one.vector_selector.name or "")) for one in direct]
    for metric, series in kinds:
        if series is not None and name in RATES and series.kind == "gauge":
            yield f"{name} of {metric}, which is a gauge"
        if series is not None and name in CHANGES and series.kind != "gauge":
            yield f"{name} of {metric}, which is no gauge"
    if name == "histogram_quantile":
        read = [SERIES[one.name] for one in selectors(_valued(node.args[1])) if one.name in SERIES]
        if any(series.kind != "bucket" for series in read):
            yield "histogram_quantile of what is no histogram's buckets"
        elif "le" not in labels_of(node.args[1]):
            yield "histogram_quantile of buckets that have lost their label le"


def _matching_problems(node: Any) -> Iterator[str]:
    if not (_is_vector(node.lhs) and _is_vector(node.rhs)):
        return
    matching = node.modifier.matching
    left, right = labels_of(node.lhs), labels_of(node.rhs)
    for name in matching.labels if matching else ():
        if name not in left or name not in right:
            yield f"{node.op} matches by the label {name}, which not both sides have"
    one_side = right if node.modifier.card == promql_parser.VectorMatchCardinality.ManyToOne else left
    for name in node.modifier.group_labels or ():
        if name not in one_side:
            yield f"{node.op} takes over the label {name}, which the other side does not have"
