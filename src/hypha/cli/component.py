"""What the four components' programs share: their flags, ``init``, ``probe`` and ``validate``.

``hypha-<component> --config X --validate`` does the same as ``validate --config X``.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from hypha.cli.excluding import excluded_for
from hypha.cli.options import (
    DEFAULT_CONFIG,
    CertOption,
    CommonOptions,
    ConfigOption,
    CrlsOption,
    InitOptions,
    KeyOption,
    LogOptions,
    SetOption,
    TrustOption,
)
from hypha.errors import ConfigError, IdentityError, Problem
from hypha.files.staging import write_whole

if TYPE_CHECKING:
    from hypha.config.models import NodeConfig
    from hypha.config.reading.loading import Flag
    from hypha.config.reading.partial import Partial

M = TypeVar("M", bound="NodeConfig")


@dataclass(frozen=True)
class Program:
    """One component: ``name`` as in ``hypha-<name>``."""

    name: str
    summary: str

    @property
    def model(self) -> type[NodeConfig]:
        """Its configuration."""
        from hypha.config.models import COMPONENTS

        return COMPONENTS[self.name]


def make_app(
    program: Program,
    check_network: Callable[[Any], int] | None = None,
    describe: Callable[[Any], Iterable[str]] = lambda _: (),
) -> typer.Typer:
    """A Typer app with ``probe``, ``validate`` and ``--validate``; the caller adds the other commands.
    ``check_network`` does what ``validate --network`` does with a valid configuration, where there is that,
    and gives the exit code. ``describe`` gives the lines that ``validate`` prints of a valid one besides.
    """
    app = typer.Typer(
        name=f"hypha-{program.name}",
        help=program.summary,
        add_completion=False,
        pretty_exceptions_enable=False,
        invoke_without_command=True,
    )

    @app.callback()
    def root(
        context: typer.Context,
        config: ConfigOption = None,
        check: Annotated[bool, typer.Option("--validate", help="Check the configuration and exit.")] = False,
        version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    ) -> None:
        if version:
            from hypha import __version__

            typer.echo(f"hypha-{program.name} {__version__}")
            raise typer.Exit()
        if context.invoked_subcommand is not None:
            if config is not None or check:
                raise typer.BadParameter(f"write the options after {context.invoked_subcommand}")
        elif check:
            validate_config(program, config, [], describe)
        else:
            typer.echo(context.get_help())
            raise typer.Exit(2)

    if check_network is None:

        @app.command()
        def validate(config: ConfigOption = None, set_: SetOption = None) -> None:
            """Check a configuration and the files it names; list all problems, exit 2 if there are any."""
            validate_config(program, config, settings(program, set_), describe)

    else:

        @app.command(name="validate")
        def validate_network(
            config: ConfigOption = None,
            set_: SetOption = None,
            network: Annotated[
                bool, typer.Option("--network", help="Also ask gateways and data nodes; try a batch.")
            ] = False,
        ) -> None:
            """Check a configuration and the files it names; list all problems, exit 2 if there are any."""
            loaded = validate_config(program, config, settings(program, set_), describe)
            if network:
                raise typer.Exit(check_network(loaded))

    @app.command()
    def probe(
        address: Annotated[str, typer.Argument(help="Multiaddr, such as /ip4/192.0.2.1/tcp/8080.")],
        config: ConfigOption = None,
        cert: CertOption = None,
        key: KeyOption = None,
        trust: TrustOption = None,
        crls: CrlsOption = None,
        timeout_ms: Annotated[int, typer.Option("--timeout", help="Milliseconds.", min=1)] = 5000,
    ) -> None:
        """Dial a node, any component's, check its certificate and ask how it is; exit 0 when it is well."""
        from hypha.cli.probing import probe_node

        identity = _probe_identity(program, config, (cert, key, trust, crls))
        raise typer.Exit(probe_node(address, identity, timeout_ms / 1000))

    return app


def _probe_identity(program: Program, config: Path | None, given: Sequence[Path | None]) -> Any:
    from hypha.pki.identity import IdentityFiles, load_identity

    cert, key, trust, crls = given
    if cert is None or key is None or trust is None:
        if (cert, key, trust) != (None, None, None):
            raise typer.BadParameter("--cert, --key and --trust go together")
        loaded = load(program, config, [])
        return load_identity(
            IdentityFiles(loaded.cert_pem, loaded.key_pem, loaded.trust_pem, loaded.crls_pem)
        )
    return load_identity(IdentityFiles(cert, key, trust, crls))


def settings(program: Program, pairs: Iterable[str] | None) -> list[Flag]:
    """Flags of ``--set``."""
    from hypha.config.reading.loading import parse_setting

    return [parse_setting(program.model, pair) for pair in pairs or ()]


def flags(*given: tuple[str, str, Any]) -> list[Flag]:
    """Flags (name, key, value) of those that were given."""
    from hypha.config.reading.loading import Flag

    return [
        Flag(name, key, str(value) if isinstance(value, Path) else value)
        for name, key, value in given
        if value is not None and value != []
    ]


def load(program: Program, config: Path | None, given: Sequence[Flag]) -> Any:
    """The component's configuration, its identity files checked too. Raises ConfigError."""
    from hypha.config.environment import process_environment
    from hypha.config.otel import resolve_telemetry
    from hypha.config.reading.loading import load_config

    path = config or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None)
    try:
        loaded = load_config(
            program.model, path, given, checks=[lambda partial: _identity_problems(program, partial)]
        )
        # variables of one signal alone are no keys
        resolve_telemetry(f"hypha-{program.name}", loaded, process_environment())
        _check_executors(loaded)
        return loaded
    except ConfigError as exc:
        if path is None:
            init = f"hypha-{program.name} init"
            hint = f"there is no such file here; name one with --config, or write it with `{init}`"
            raise ConfigError([Problem("", hint, str(DEFAULT_CONFIG)), *exc.problems]) from exc
        raise


def load_to_run(program: Program, node: CommonOptions, logs: LogOptions, *own: tuple[str, str, Any]) -> Any:
    """As :func:`load`, with what was given to ``run``: the options of all components, and ``own`` ones as
    :func:`flags` takes them.
    """
    given = flags(
        ("--gateway", "gateway_addresses", node.gateway),
        ("--listen", "listen_addresses", node.listen),
        ("--external", "external_addresses", node.external),
        ("--exclude-cidr", "exclude_cidr", node.exclude_cidr),
        ("--http", "http_address", node.http),
        *own,
        ("--log-level", "log_level", logs.log_level),
        ("--log-format", "log_format", logs.log_format),
    )
    return load(program, node.config, [*given, *settings(program, logs.set_)])


def _check_executors(loaded: NodeConfig) -> None:
    """ConfigError where a worker would offer what Hypha's own executors cannot do here, and fail each job."""
    from hypha.config.models import WorkerConfig

    if not isinstance(loaded, WorkerConfig):
        return
    own = [index for index, executor in enumerate(loaded.executors) if executor.cmd is None]
    if own and importlib.util.find_spec("torch") is None:
        message = (
            "it has no cmd, so it is Hypha's own, and torch is not installed for it "
            "(pip install 'hypha-train[train]')"
        )
        raise ConfigError([Problem(f"executors[{own[0]}]", message)])


def _identity_problems(program: Program, partial: Partial) -> Iterator[Problem]:
    from hypha.pki.identity import IdentityFiles, load_identity

    files = [partial.get(key) for key in ("cert_pem", "key_pem", "trust_pem")]
    if None in files:
        return
    try:
        # whoever goes on to use it, or to tell what it is worth, warns
        identity = load_identity(
            IdentityFiles(files[0], files[1], files[2], partial.get("crls_pem")), warn=False
        )
    except IdentityError as exc:
        yield from exc.problems
        return
    if identity.roles and program.name not in identity.roles:
        has = " and ".join(sorted(identity.roles))
        message = (
            f"{files[0]}: the certificate is for the role {has}, and other nodes would refuse this "
            f"{program.name}; make one with `hypha-certutil node --role {program.name}`"
        )
        yield Problem("cert_pem", message)
    if not identity.roles and partial.get("require_roles") is not False:
        message = (
            f"{files[0]}: the certificate carries no role, and nodes with require_roles (the default) refuse "
            f"it; give it one with `hypha-certutil renew {files[0]} --role {program.name} --ca-cert ... "
            "--ca-key ...` (its PeerID stays), or set require_roles = false here and wherever it is to be "
            "accepted"
        )
        yield Problem("cert_pem", message)


def validate_config(
    program: Program,
    config: Path | None,
    given: Sequence[Flag],
    describe: Callable[[Any], Iterable[str]] = lambda _: (),
) -> Any:
    """Print OK, what ``describe`` says of it and what is advised, and return the configuration, or raise
    ConfigError.
    """
    from hypha.config.advice import advice
    from hypha.pki.identity import IdentityFiles, load_identity

    loaded = load(program, config, given)
    load_identity(IdentityFiles(loaded.cert_pem, loaded.key_pem, loaded.trust_pem, loaded.crls_pem))
    typer.echo(f"OK: {config or DEFAULT_CONFIG} is a valid configuration of hypha-{program.name}")
    for line in describe(loaded):
        typer.echo(line)
    for one in advice(loaded):
        typer.echo(f"advice: {one}")
    return loaded


# --- init -------------------------------------------------------------------------------------------


def write_config(
    program: Program, options: InitOptions, given: Mapping[str, Any], fill_in: Mapping[str, str]
) -> None:
    """Write a commented configuration of ``given``. Refuses to overwrite one unless ``--force`` was given."""
    from hypha.config.reading.template import write_template

    output = options.output
    if output.exists() and not options.force:
        raise ConfigError(f"{output} exists; add --force to overwrite it, or choose another --output")
    values = {
        key: _beside(output, value) if isinstance(value, Path) else value
        for key, value in given.items()
        if value is not None and value != []
    }
    text = write_template(program.model, values, fill_in)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # tokens may be written into it: nobody else's business
        write_whole(output, text.encode(), mode=0o600)
    except OSError as exc:
        raise ConfigError(f"{output} cannot be written: {exc.strerror}") from exc
    typer.echo(f"wrote {output}")
    for key, what in fill_in.items():
        typer.echo(f"  fill in {key}: {what}")
    typer.echo(f"then check it: hypha-{program.name} validate --config {output}")


def node_keys(program: Program, options: InitOptions) -> dict[str, Any]:
    """The keys of every component, as ``init`` writes them. Identity files are as given, else
    ``<name>-cert.pem`` and so on in ``--pki``. The revocation list is there from the start, though nobody may
    be revoked yet: it is read as soon as it exists.
    """
    stem = options.name or program.name
    dialled = [*(options.gateway or ()), *(options.external or ())]
    return {
        "cert_pem": options.cert or options.pki / f"{stem}-cert.pem",
        "key_pem": options.key or options.pki / f"{stem}-key.pem",
        "trust_pem": options.trust or options.pki / f"{stem}-trust.pem",
        "crls_pem": options.crls or options.pki / "crls.pem",
        "listen_addresses": options.listen,
        "external_addresses": options.external,
        "gateway_addresses": options.gateway,
        "exclude_cidr": excluded_for(dialled, options.exclude_cidr, options.allow_cidr),
        "http_address": _local_http(program, options.name) if options.http is None else options.http,
    }


def leaf_keys(program: Program, options: InitOptions) -> dict[str, Any]:
    """:func:`node_keys` of every component but the gateway."""
    gateways = options.gateway or ["/dns4/gateway.example.org/tcp/8080"]
    return {**node_keys(program, options), "gateway_addresses": gateways}


def leaf_fill_in(gateway: list[str] | None) -> dict[str, str]:
    """What the operator of a leaf has to write when no gateway was given."""
    return {} if gateway else {"gateway_addresses": "the addresses your gateway prints when it starts"}


#: where each component's local HTTP listens unless told otherwise
HTTP_PORTS = {"gateway": 9101, "scheduler": 9102, "worker": 9103, "data": 9104}


def _local_http(program: Program, name: str | None) -> str:
    """The address for local HTTP that ``init`` writes: on this machine alone. Several nodes of one kind on
    one machine are told apart by the number at the end of their names: ``worker-2`` is ten ports further up.
    """
    number = re.search(r"(\d{1,3})$", name or "")
    return f"127.0.0.1:{HTTP_PORTS[program.name] + 10 * max(0, int(number[1]) - 1 if number else 0)}"


def _beside(output: Path, path: Path) -> str:
    """``path``, typed relative to where we are, as it is to be written into ``output``."""
    return str(path) if path.is_absolute() else os.path.relpath(path, output.parent)
