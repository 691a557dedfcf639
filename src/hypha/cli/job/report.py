"""``hypha report``: what is known of a job in one file, to hand to somebody else.

In the archive are the ledger and all other tables of ``job.db`` as JSON (never the database itself: its free
pages may hold what was deleted), the history of rounds, the journal of a job that failed, the versions of
what ran, the configuration without its secrets, and the ends of the logs that are named. Every text is
searched for the secrets of the configuration and of the environment before it goes in; private keys are never
read.
"""

from __future__ import annotations

import io
import json
import platform
import sqlite3
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from hypha.cli.job.redaction import redacted, redacted_config, secrets_in
from hypha.cli.job.timeline import job_directory
from hypha.cli.options import DEFAULT_CONFIG
from hypha.decoding import decode
from hypha.errors import ConfigError, HyphaError, OutputError, Undecodable
from hypha.files.staging import StagedFile

if TYPE_CHECKING:
    from hypha.config.models import SchedulerConfig

#: of a log, or of a journal, its end
_MAX_LOG_BYTES = 4 << 20
_PACKAGES = (
    *("hypha-train", "libp2p", "trio", "torch", "transformers", "accelerate", "datasets", "safetensors"),
    *("numpy", "msgspec", "pydantic", "cryptography", "hypercorn", "starlette", "opentelemetry-sdk"),
)
_ABOUT = """\
What `hypha report` has gathered of one job. {secrets}
Addresses, PeerIDs and names of nodes are in here.

job.json        all tables of the job's ledger
rounds.json     what each round was spent on; `hypha timeline` makes a picture of the same
nodes.json      names of nodes, as their certificates say, by PeerID
journal.jsonl   what the scheduler decided last, if the job failed
versions.json   what ran
config.json     the scheduler's configuration, if it was found
logs/           the ends of the logs that were named
"""
_KNOWN = "Tokens, passwords and keys of {name} and of the environment were replaced by [secret]."
_UNKNOWN = (
    "The scheduler's configuration was not known{why}: its secrets may still be in here,\n"
    "as only those of the environment, private keys and what stands for one in an address were replaced by\n"
    "[secret]. Name it with --config."
)


def report(
    job: Annotated[str, typer.Argument(help="A job's state directory, or its name under --state-dir.")],
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            help="The scheduler's TOML file, for what is secret; config.toml when there is one.",
        ),
    ] = None,
    log: Annotated[
        list[Path] | None, typer.Option("--log", help="A log whose end belongs to it. May be repeated.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file; <job>-report.tar.gz here by default.")
    ] = None,
    state_dir: Annotated[
        Path, typer.Option("--state-dir", help="Where the scheduler keeps its jobs' state.")
    ] = Path("state"),
) -> None:
    """Gather what is known of a job, without secrets, in one .tar.gz for somebody else."""
    directory = job_directory(job, state_dir)
    target = output or Path(f"{directory.resolve().name}-report.tar.gz")
    loaded, about = _configuration(config)
    texts = dict(_gathered(directory, loaded, about, log or []))
    try:
        write_archive(target, texts)
    except OSError as exc:
        raise OutputError(f"{target} cannot be written: {exc.strerror}") from exc
    if loaded is None:
        typer.echo(about, err=True)
    typer.echo(f"{len(texts)} files are in {target}; look through it before you hand it on")


def write_archive(path: Path, texts: dict[str, str]) -> None:
    """A .tar.gz of ``texts`` by name, whole or not at all. Blocks; raises OSError."""
    with StagedFile(path, mode=0o600) as staged:
        with tarfile.open(fileobj=staged.file, mode="w:gz") as archive:
            for name, text in texts.items():
                data = text.encode()
                member = tarfile.TarInfo(f"hypha-report/{name}")
                member.size, member.mode = len(data), 0o600
                archive.addfile(member, io.BytesIO(data))
        staged.publish()


def _configuration(path: Path | None) -> tuple[SchedulerConfig | None, str]:
    """The one that was named, else the one that is here, and a sentence on what it means for secrets. Raises
    :class:`ConfigError` for one that was named.
    """
    from hypha.config.models import SchedulerConfig
    from hypha.config.reading.loading import load_config

    if path is None and not DEFAULT_CONFIG.exists():
        return None, _UNKNOWN.format(why="")
    used = path or DEFAULT_CONFIG
    try:
        return load_config(SchedulerConfig, used), _KNOWN.format(name=used.name)
    except ConfigError:
        if path is not None:
            raise
        # a directory of another component, perhaps
        return None, _UNKNOWN.format(why=f", as {used} here is none of a scheduler")


def _gathered(
    directory: Path, loaded: SchedulerConfig | None, about: str, logs: Sequence[Path]
) -> Iterator[tuple[str, str]]:
    from hypha.scheduler.status.history_file import read_history

    secrets = secrets_in(loaded) | _page_token(directory)
    rounds = read_history(directory)
    found = {
        "README.txt": _ABOUT.format(secrets=about),
        "job.json": _json(_tables(directory / "job.db")),
        "rounds.json": _json(msgspec.to_builtins(rounds)),
        "nodes.json": _json({peer: name for record in rounds for peer, name in record.names.items()}),
        "versions.json": _json(_versions()),
    }
    if loaded is not None:
        found["config.json"] = _json(redacted_config(loaded.model_dump(mode="json")))
    for path in sorted(directory.glob("journal*.jsonl")):
        found[path.name] = _end_of(path)
    for number, path in enumerate(logs):
        # two of the same name both go in
        found[f"logs/{number + 1}-{path.name}"] = _end_of(path)
    for name, text in found.items():
        yield name, redacted(text, secrets)


def _tables(ledger: Path) -> dict[str, list[dict[str, object]]]:
    """Every table of the ledger; what is JSON in a column stays JSON, so that nothing is escaped twice."""
    if not ledger.exists():
        return {}
    try:
        # a copy in memory, so that a job that runs is not held up
        with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as kept:
            with closing(sqlite3.connect(":memory:")) as db:
                kept.backup(db)
                db.row_factory = sqlite3.Row
                names = [
                    row[0]
                    for row in db.execute(
                        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
                    )
                ]
                return {name: [_row(row) for row in db.execute(f'SELECT * FROM "{name}"')] for name in names}
    except sqlite3.Error as exc:
        raise HyphaError(f"the job's ledger {ledger} cannot be read: {exc}") from exc


def _row(row: sqlite3.Row) -> dict[str, object]:
    return {key: _value(row[key]) for key in row.keys()}  # noqa: SIM118 - a row is no dict


def _value(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return decode(json.loads, value)
        except Undecodable:
            return value
    return value


def _page_token(directory: Path) -> frozenset[str]:
    try:
        return frozenset({(directory / "page-token").read_text().strip()} - {""})
    except OSError:
        return frozenset()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _end_of(path: Path) -> str:
    """Its last whole lines."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _MAX_LOG_BYTES))
            data = file.read()
    except OSError as exc:
        raise HyphaError(f"{path} cannot be read: {exc.strerror}") from exc
    text = data.decode(errors="replace")
    return text.partition("\n")[2] if size > _MAX_LOG_BYTES else text


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
