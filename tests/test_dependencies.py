"""What the code imports is what pyproject.toml declares, no less and no more."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from hypha.config.checks import SINK_PACKAGES
from hypha.sinks.child import SINKS

ROOT = Path(__file__).parent.parent
#: declared for what another library does with them, or imported by a name that is put together
UNIMPORTED = {
    "opentelemetry-exporter-otlp-json-http",
    "opentelemetry-exporter-otlp-proto-grpc",
    "opentelemetry-exporter-otlp-proto-http",
}
#: of the packages that share a namespace
NAMESPACE = {
    "opentelemetry.sdk": "opentelemetry-sdk",
    "opentelemetry.exporter.prometheus": "opentelemetry-exporter-prometheus",
    "opentelemetry.instrumentation.logging": "opentelemetry-instrumentation-logging",
    "opentelemetry": "opentelemetry-api",
}
#: of the modules of an extra that need not be installed here
EXTRAS = {"pynvml": "nvidia-ml-py"}


def declared(requirements: list[str]) -> set[str]:
    return {_plain(re.split(r"[\[=<>~! ;]", requirement)[0]) for requirement in requirements}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> dict[str, str]:
    """Distribution -> one of the files that import it."""
    distributions = packages_distributions()
    found = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                # of a package that several distributions share
                names = [node.module if node.module.partition(".")[0] != "google" else "google.protobuf"]
            for name in names:
                top = name.partition(".")[0]
                if top in sys.stdlib_module_names or top == "hypha":
                    continue
                found[_owner(name, distributions.get(top, []))] = str(path.relative_to(ROOT))
    return found


def _owner(name: str, candidates: list[str]) -> str:
    if name in EXTRAS:
        return EXTRAS[name]
    if name.startswith("google."):
        return "protobuf"
    if name.startswith("opentelemetry"):
        return next(owner for prefix, owner in NAMESPACE.items() if name.startswith(prefix))
    return _plain(candidates[0]) if candidates else f"nobody ({name})"


def test_every_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core, train = declared(project["dependencies"]), declared(project["optional-dependencies"]["train"])
    gpu = declared(project["optional-dependencies"]["gpu"])
    uses = imported()
    assert {name: path for name, path in uses.items() if name not in core | train | gpu} == {}
    assert core | train | gpu == set(uses) | UNIMPORTED, "declared, but nothing imports it"
    assert {uses[name] for name in gpu} == {"src/hypha/telemetry/resources.py"}
    # without the extra there is no training and no preparing of data, but everything else
    allowed = ("src/hypha/executor/", "src/hypha/data/", "src/hypha/cli/local/")
    assert {name for name in train if not uses[name].startswith(allowed)} == set()


def test_every_metric_sink_has_the_extra_that_validate_names() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name: declared(extras[name]) for name in SINKS if name != "http"} == {
        name: {name} for name in SINK_PACKAGES
    }
