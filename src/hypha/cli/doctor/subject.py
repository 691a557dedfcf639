"""Whom the doctor looks at: a configuration of any component, and perhaps a job's.

A configuration that is not valid is no reason to stop: its problems are findings, and the machine and the
identity files that it names are looked at all the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict

from hypha.access import ROLES
from hypha.cli.running import files_in
from hypha.config.job import JobConfig
from hypha.config.models import COMPONENTS, LeafConfig, NodeConfig, SchedulerConfig, SchedulerSection
from hypha.config.reading.layers import Layer, Settings
from hypha.config.reading.loading import load_config, read_toml
from hypha.config.section import Section
from hypha.errors import ConfigError, IdentityError, Problem
from hypha.pki.identity import IdentityFiles
from hypha.pki.inspection import InspectedCertificate, inspected
from hypha.pki.issuers import load_certificate


class _JobFile(Section):
    """Of a scheduler's configuration the job alone: certificates, paths and addresses are of its machine."""

    model_config = ConfigDict(extra="ignore")

    scheduler: SchedulerSection


@dataclass(frozen=True)
class Subject:
    """``config`` is None where ``problems`` say why; ``files`` are named by a file that can be read at all.
    Without ``path`` only the machine is looked at.
    """

    component: str = ""
    path: Path | None = None
    config: NodeConfig | None = None
    files: IdentityFiles | None = None
    problems: tuple[Problem, ...] = ()
    job: JobConfig | None = None


def read_subject(path: Path | None, component: str | None = None, job: Path | None = None) -> Subject:
    """Raises ConfigError: no file, no TOML, nobody's keys, or no job in ``job``."""
    wanted = read_job(job) if job is not None else None
    if path is None:
        return Subject(component or "", job=wanted)
    _, raw = read_toml(path)
    settings = Settings(NodeConfig)
    settings.add(Layer(NodeConfig, raw, str(path), base=path.absolute().parent))
    files = files_in(settings)
    name = component or component_of(raw, files, path)
    try:
        config = load_config(COMPONENTS[name], path)
    except ConfigError as exc:
        return Subject(name, path, None, files, tuple(exc.problems), wanted)
    files = IdentityFiles(config.cert_pem, config.key_pem, config.trust_pem, config.crls_pem)
    if wanted is None and isinstance(config, SchedulerConfig):
        wanted = config.scheduler.job
    return Subject(name, path, config, files, (), wanted)


def read_job(path: Path) -> JobConfig:
    """The job in a scheduler's configuration. Raises ConfigError."""
    return load_config(_JobFile, path).scheduler.job


def component_of(raw: Iterable[str], files: IdentityFiles | None, path: Path) -> str:
    """Of the component which alone knows the most of its keys, else of its certificate's role."""
    keys = {key.replace("-", "_") for key in raw}
    shared = set(LeafConfig.model_fields)
    own = {name: len(keys & (set(model.model_fields) - shared)) for name, model in COMPONENTS.items()}
    best, second = sorted(own, key=lambda name: -own[name])[:2]
    if own[best] > own[second]:
        return best
    certificate = None if files is None else own_certificate(files)
    if certificate is not None and len(roles := [one for one in certificate.roles if one in ROLES]) == 1:
        return roles[0]
    message = (
        f"neither its keys nor its certificate's role tell whose it is; say --component {'|'.join(ROLES)}"
    )
    raise ConfigError([Problem("", message, str(path))])


def own_certificate(files: IdentityFiles) -> InspectedCertificate | None:
    """Whether it is good or not; None where there is none."""
    try:
        return inspected(load_certificate(files.cert))
    except IdentityError:
        return None
