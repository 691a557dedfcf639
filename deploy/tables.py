"""``python -m deploy.tables``: write the tables of docs/observability.md, docs/security.md, docs/tuning.md
and docs/troubleshooting.md anew, from the registries and the configuration's models, and the picture in
ARCHITECTURE.md from the imports.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from deploy.promql import label_name
from deploy.rooms import picture
from hypha import access
from hypha.cli.doctor.checks import CHECKS, Symptom
from hypha.config.models import COMPONENTS
from hypha.config.reading.layers import section_in
from hypha.config.reading.template import notes_of
from hypha.config.section import Section
from hypha.telemetry import instruments
from hypha.telemetry.metrics import OTHER, Instrument, Label
from hypha.tracing.operations import Operation

_DOCS = Path(__file__).parent.parent / "docs"
PAGE = _DOCS / "observability.md"
SECURITY = _DOCS / "security.md"
TUNING = _DOCS / "tuning.md"
TROUBLESHOOTING = _DOCS / "troubleshooting.md"
ARCHITECTURE = _DOCS.parent / "ARCHITECTURE.md"
#: a label with more values than this is described by their number
_MANY = 10

#: what a worker's time goes to, as docs/observability.md explains it
BADPUT: dict[str, str] = {
    "allocating": "nobody is leased for the place, or there is no parameter server",
    "loading": "leased, and the model is not there yet, or not that of others whom the start waits for",
    "waiting-for-data": "time of a round that was spent in no batch",
    "waiting-for-theta": "from the last batch until the parameter server has the update, and from closing "
    "the round until training begins again; at the job's end, while the model is exported",
    "waiting-for-stragglers": "the parameter server has the update, and waits for those of others",
    "failure": "from the last sign of life of what was lost until somebody trains in its place",
    "replayed": "batches of rounds that were lost, of updates that were left out, refused or never sent",
    "paused": "the round is kept open for lack of workers, or nobody serves the dataset",
}


def metrics() -> str:
    """All metrics of the registry."""
    rows = (
        (
            f"`{one.prometheus_name}`",
            one.kind,
            one.unit.strip("{}").replace("_", " "),
            ", ".join(_label(label) for label in one.labels),
            f"{one.help} `{one.name}`" if one.name.count(".") else one.help,
        )
        for one in Instrument.declared.values()
    )
    return _table(("In Prometheus", "Kind", "Unit", "Labels", "What it says; its name by OTLP"), rows)


def traced() -> str:
    """All operations of the registry."""
    rows = ((one.name, one.who, one.what) for one in Operation.declared.values())
    return _table(("Span", "Component", "What it covers"), rows)


def badput() -> str:
    """All reasons for badput."""
    return _table(
        ("`reason`", "Worker seconds"), ((f"`{one}`", BADPUT[one]) for one in instruments.BADPUT_REASONS)
    )


def requests() -> str:
    """All requests, by who may send them."""
    return _uses("Request", {kind.__name__: use for kind, use in access.REQUESTS.items()})


def topics() -> str:
    """All gossip topics, by who may publish."""
    return _uses("Topic", access.TOPICS)


def streams() -> str:
    """All protocols of streams, by who may open one."""
    return _uses("Protocol", {**access.STREAMS, **access.LIBRARY_STREAMS})


def frames() -> str:
    """All frames that begin a file on a bulk connection, by who may send one."""
    return _uses("Frame", access.FRAMES)


def directory() -> str:
    """All queries of the directory, by who may ask."""
    return _uses("Query", access.DIRECTORY)


def services() -> str:
    """What a node is used for, by what its own certificate must carry."""
    return _uses("Used as", access.SERVICES)


def kinds() -> str:
    """All kinds of files, by who may send and who may take them."""
    rows = (
        (f"`{kind}`", access.named(use.senders), access.named(use.receivers), use.what)
        for kind, use in access.KINDS.items()
    )
    return _table(("Kind", "From", "To", "What it is"), rows)


#: keys that tune and stand in tables of their own, by component and table
ELSEWHERE = (
    ("worker", "offer", ("temporary_lease_s", "lease_s")),
    ("worker", "executors", ("threads",)),
    ("worker", "cache", ("max_slices", "max_gb", "prefetch_s")),
    ("gateway", "", ("max_connections", "max_circuits", "max_reservations")),
    ("scheduler", "scheduler.job", ("update_encoding",)),
)


def tuning() -> str:
    """All keys of ``[tuning]``; those of gateways alone are named so."""
    everywhere = dict(_keys(COMPONENTS["worker"], "tuning"))
    gateways = dict(_keys(COMPONENTS["gateway"], "tuning"))
    rows = [
        (f"`{key}`" + ("" if key in everywhere else " (gateways)"), *told) for key, told in gateways.items()
    ]
    return _table(("Key", "Default", "Range", "What it is, and when to turn it"), rows)


def limits() -> str:
    """All keys of ``[limits]`` that every component has."""
    rows = ((f"`{key}`", *told) for key, told in _keys(COMPONENTS["data"], "limits"))
    return _table(("Key", "Default", "Range", "What it is"), rows)


def elsewhere() -> str:
    """Keys of other tables that tune."""
    rows = []
    for component, table, names in ELSEWHERE:
        found = dict(_keys(COMPONENTS[component], table))
        for name in names:
            key = f"{table}.{name}" if table else name
            rows.append((f"`{key}`", component, *found[key]))
    return _table(("Key", "Of", "Default", "Range", "What it is"), rows)


def _keys(model: type[Section], table: str) -> Iterator[tuple[str, tuple[str, str, str]]]:
    """Of ``table`` and what is below it: dotted key, and default, range and notes."""
    for part in table.split(".") if table else ():
        inner, _ = section_in(model, part)
        if inner is None:
            raise KeyError(f"{part} of {table} is no table")
        model = inner
    for name, info in model.model_fields.items():
        inner, many = section_in(model, name)
        key = f"{table}.{name}" if table else name
        if inner is None:
            default = "" if info.is_required() else _default(info.get_default(call_default_factory=True))
            bounds = _bounds(info)
            yield key.replace(".start", ".from"), (default, bounds, " ".join(notes_of(info)))
        elif many or table.partition(".")[0] == "tuning":
            for below, told in _keys(inner, ""):
                yield f"{key}.{below}", told


def _default(value: object) -> str:
    return "" if value is None or value == [] else f"{value:g}" if isinstance(value, float) else str(value)


def _bounds(info: FieldInfo) -> str:
    """Such as ``1 to 64``, or the words that may stand there."""
    words = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
    if words:
        return ", ".join(map(str, words))
    found: dict[str, float] = {}
    for mark in info.metadata:
        found.update({name: getattr(mark, name) for name in ("ge", "gt", "le", "lt") if hasattr(mark, name)})
    text = {name: f"{bound:.15g}" for name, bound in found.items()}
    low = text["ge"] if "ge" in text else f"above {text['gt']}" if "gt" in text else ""
    high = text["le"] if "le" in text else f"below {text['lt']}" if "lt" in text else ""
    return f"{low} to {high}" if low and high else f"{low} or more" if "ge" in found else low or high


def _uses(head: str, uses: Mapping[str, access.Use]) -> str:
    def marks(use: access.Use) -> Iterator[str]:
        return ("yes" if use.by is None or role in use.by else "" for role in access.ROLES)

    rows = ((f"`{name}`", *marks(use), use.what) for name, use in uses.items())
    return _table((head, *access.ROLES, "What for"), rows)


def found_with(symptom: Symptom) -> str:
    """What `hypha doctor` finds where somebody sees ``symptom``, and how to mend it."""
    rows = (
        (f"`{one.name}`", one.severity, one.what, one.why, _PLACEHOLDER.sub(r"*\1*", one.mend))
        for one in CHECKS.values()
        if one.symptom == symptom
    )
    return _table(("Check", "Severity", "What is found", "Why it matters", "To mend it"), rows)


#: ``<name>`` outside of code, which a reader of the page would not see
_PLACEHOLDER = re.compile(r"<(\w+)>(?=[^`]*(?:`[^`]*`[^`]*)*$)")


def table_of(symptom: Symptom) -> str:
    """What its table is called on the page."""
    return re.sub(r"\W+", "_", symptom.title.lower())


#: in the order of the page
SYMPTOMS = tuple(dict.fromkeys(one.symptom for one in CHECKS.values()))

#: by page
PAGES: Mapping[Path, Mapping[str, Callable[[], str]]] = {
    PAGE: {"metrics": metrics, "operations": traced, "badput": badput},
    SECURITY: {
        "requests": requests,
        "topics": topics,
        "streams": streams,
        "frames": frames,
        "directory": directory,
        "services": services,
        "kinds": kinds,
    },
    TUNING: {"limits": limits, "tuning": tuning, "elsewhere": elsewhere},
    ARCHITECTURE: {"rooms": picture},
    TROUBLESHOOTING: {table_of(one): partial(found_with, one) for one in SYMPTOMS},
}
TABLES = {name: table for tables in PAGES.values() for name, table in tables.items()}


def _label(label: Label) -> str:
    values = [one for one in label.values if one != OTHER]
    if not values:
        return f"`{label_name(label.name)}` ({label.bound})"
    if len(values) > _MANY:
        return f"`{label_name(label.name)}` (one of {len(values)})"
    return f"`{label_name(label.name)}` ({', '.join(values)})"


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    heads = list(heads)
    return "\n".join([line(heads), "|" + "---|" * len(heads), *map(line, rows)])


def sections(text: str) -> Iterator[tuple[str, str]]:
    """(name, content) of what stands between ``<!-- table: name -->`` and ``<!-- end -->``."""
    for match in _SECTION.finditer(text):
        yield match["name"], match["content"].strip()


def rewrite(text: str) -> str:
    """The page with all its tables as they should be. Raises KeyError for one that is not known."""
    return _SECTION.sub(
        lambda found: f"<!-- table: {found['name']} -->\n\n{TABLES[found['name']]()}\n\n<!-- end -->", text
    )


_SECTION = re.compile(r"<!-- table: (?P<name>\w+) -->\n(?P<content>.*?)<!-- end -->", re.DOTALL)


def main() -> int:
    """Write them."""
    for page in PAGES:
        page.write_text(rewrite(page.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
