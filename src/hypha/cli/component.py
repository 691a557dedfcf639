"""What the four components' programs share: their flags, ``init``, ``probe`` and ``validate``.

``hypha-<component> --config X --validate`` does the same as ``validate --config X``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hypha.cli.options import (
    DEFAULT_CONFIG,
    ConfigOption,
    IdentityOptions,
    InitOptions,
    RunOptions,
    SetOption,
    with_options,
)
from hypha.cli.running import files_in, identity_of
from hypha.errors import ConfigError, IdentityError, Problem
from hypha.files.staging import write_whole

if TYPE_CHECKING:
    from hypha.config.reading.layers import Settings
    from hypha.config.reading.loading import Flag
    from hypha.pki.identity import Identity


def make_app(
    component: str,
    summary: str,
    describe: Callable[[Any], Iterable[str]] = lambda _: (),
    validates: Callable[..., None] | None = None,
) -> typer.Typer:
    """A Typer app with ``probe``, ``validate`` and ``--validate``; the caller adds the other commands.
    ``describe`` gives the lines that ``validate`` prints of a valid configuration besides; ``validates`` is
    a ``validate`` that can do more.
    """
    app = typer.Typer(
        name=f"hypha-{component}",
        help=summary,
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

            typer.echo(f"hypha-{component} {__version__}")
            raise typer.Exit()
        if context.invoked_subcommand is not None:
            if config is not None or check:
                raise typer.BadParameter(f"write the options after {context.invoked_subcommand}")
        elif check:
            validate_config(component, config, [], describe)
        else:
            typer.echo(context.get_help())
            raise typer.Exit(2)

    def validate(config: ConfigOption = None, set_: SetOption = None) -> None:
        """Check a configuration and the files it names; list all problems, exit 2 if there are any."""
        validate_config(component, config, settings(component, set_), describe)

    app.command(name="validate")(validates or validate)

    @app.command()
    @with_options
    def probe(
        address: Annotated[str, typer.Argument(help="Multiaddr, such as /ip4/192.0.2.1/tcp/8080.")],
        config: ConfigOption = None,
        *,
        files: IdentityOptions,
        timeout_ms: Annotated[int, typer.Option("--timeout", help="Milliseconds.", min=1)] = 5000,
    ) -> None:
        """Dial a node, any component's, check its certificate and ask how it is; exit 0 when it is well."""
        from hypha.cli.probing import probe_node

        identity = _probe_identity(component, config, files)
        raise typer.Exit(probe_node(address, identity, timeout_ms / 1000))

    return app


def _probe_identity(component: str, config: Path | None, files: IdentityOptions) -> Identity:
    from hypha.pki.identity import IdentityFiles, load_identity

    if files.cert is not None and files.key is not None and files.trust is not None:
        return load_identity(IdentityFiles(files.cert, files.key, files.trust, files.crls))
    if (files.cert, files.key, files.trust) != (None, None, None):
        raise typer.BadParameter("--cert, --key and --trust go together")
    return identity_of(load(component, config, []))


def settings(component: str, pairs: Iterable[str] | None) -> list[Flag]:
    from hypha.config.models import COMPONENTS
    from hypha.config.reading.loading import parse_setting

    return [parse_setting(COMPONENTS[component], pair) for pair in pairs or ()]


def load(component: str, config: Path | None, given: Sequence[Flag], warn: bool = False) -> Any:
    """The component's configuration, its identity files checked too; ``warn``: of what will end soon is
    warned, which else those do who go on to use them. Raises ConfigError.
    """
    from hypha.config.environment import process_environment
    from hypha.config.models import COMPONENTS
    from hypha.config.otel import resolve_telemetry
    from hypha.config.reading.loading import load_config

    path = config or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None)
    try:
        loaded = load_config(
            COMPONENTS[component],
            path,
            given,
            checks=[lambda settings: _own_problems(component, settings, warn)],
        )
        # variables of one signal alone are no keys
        resolve_telemetry(f"hypha-{component}", loaded, process_environment())
        return loaded
    except ConfigError as exc:
        if path is None:
            init = f"hypha-{component} init"
            hint = f"there is no such file here; name one with --config, or write it with `{init}`"
            raise ConfigError([Problem("", hint, str(DEFAULT_CONFIG)), *exc.problems]) from exc
        raise


def load_to_run(component: str, options: RunOptions, *own: tuple[str, str, Any]) -> Any:
    """As :func:`load`, with what was given to ``run``; of its ``own``: name, key and value."""
    from hypha.config.reading.loading import Flag

    given = (
        ("--gateway", "gateway_addresses", options.gateway),
        ("--listen", "listen_addresses", options.listen),
        ("--external", "external_addresses", options.external),
        ("--exclude-cidr", "exclude_cidr", options.exclude_cidr),
        ("--http", "http_address", options.http),
        *own,
        ("--log-level", "log_level", options.log_level),
        ("--log-format", "log_format", options.log_format),
    )
    flags = [
        Flag(name, key, str(value) if isinstance(value, Path) else value)
        for name, key, value in given
        if value is not None and value != []
    ]
    return load(component, options.config, [*flags, *settings(component, options.set_)])


def _own_problems(component: str, settings: Settings, warn: bool) -> Iterator[Problem]:
    """What is wrong with the identity files; and where a worker would offer what Hypha's own executors cannot
    do here, so that each job would fail.
    """
    from hypha.pki.identity import load_identity

    own = [index for index, one in enumerate(settings.get("executors") or ()) if one.cmd is None]
    if own and importlib.util.find_spec("torch") is None:
        message = (
            "it has no cmd, so it is Hypha's own, and torch is not installed for it "
            "(pip install 'hypha-train[train]')"
        )
        yield Problem(f"executors[{own[0]}]", message)
    if (files := files_in(settings)) is None:
        return
    try:
        identity = load_identity(files, warn=warn)
    except IdentityError as exc:
        yield from exc.problems
        return
    if identity.roles and component not in identity.roles:
        has = " and ".join(sorted(identity.roles))
        message = (
            f"{files.cert}: the certificate is for the role {has}, and other nodes would refuse this "
            f"{component}; make one with `hypha-certutil node --role {component}`"
        )
        yield Problem("cert_pem", message)
    if not identity.roles and settings.get("require_roles") is not False:
        message = (
            f"{files.cert}: the certificate carries no role, and nodes with require_roles (the default) "
            f"refuse it; give it one with `hypha-certutil renew {files.cert} --role {component} --ca-cert "
            "... --ca-key ...` (its PeerID stays), or set require_roles = false here and wherever it is to "
            "be accepted"
        )
        yield Problem("cert_pem", message)


def validate_config(
    component: str,
    config: Path | None,
    given: Sequence[Flag],
    describe: Callable[[Any], Iterable[str]] = lambda _: (),
) -> Any:
    """Print OK, what ``describe`` says of it and what is advised. Raises ConfigError."""
    from hypha.config.advice import advice

    loaded = load(component, config, given, warn=True)
    typer.echo(f"OK: {config or DEFAULT_CONFIG} is a valid configuration of hypha-{component}")
    for line in describe(loaded):
        typer.echo(line)
    for one in advice(loaded):
        typer.echo(f"advice: {one}")
    return loaded


def write_config(
    component: str, options: InitOptions, given: Mapping[str, Any], fill_in: Mapping[str, str]
) -> None:
    """Write a commented configuration of ``given`` and the keys of every component; ``fill_in`` is what its
    operator has to write. Refuses to overwrite one unless ``--force`` was given.
    """
    from hypha.config.models import COMPONENTS
    from hypha.config.reading.template import write_template

    output = options.output
    keys = _node_keys(component, options)
    if component != "gateway" and not options.gateway:
        keys["gateway_addresses"] = ["/dns4/gateway.example.org/tcp/8080"]
        fill_in = {"gateway_addresses": "the addresses your gateway prints when it starts", **fill_in}
    if output.exists() and not options.force:
        raise ConfigError(f"{output} exists; add --force to overwrite it, or choose another --output")
    values = {
        # a path was typed relative to where we are
        key: str(value if value.is_absolute() else os.path.relpath(value, output.parent))
        if isinstance(value, Path)
        else value
        for key, value in (keys | dict(given)).items()
        if value is not None and value != []
    }
    text = write_template(COMPONENTS[component], values, fill_in)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # tokens may be written into it: nobody else's business
        write_whole(output, text.encode(), mode=0o600)
    except OSError as exc:
        raise ConfigError(f"{output} cannot be written: {exc.strerror}") from exc
    typer.echo(f"wrote {output}")
    for key, what in fill_in.items():
        typer.echo(f"  fill in {key}: {what}")
    typer.echo(f"then check it: hypha-{component} validate --config {output}")


def _node_keys(component: str, options: InitOptions) -> dict[str, Any]:
    """The keys of every component, as ``init`` writes them. Identity files are as given, else
    ``<name>-cert.pem`` and so on in ``--pki``. The revocation list is there from the start, though nobody may
    be revoked yet: it is read as soon as it exists.
    """
    stem = options.name or component
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
        "http_address": _local_http(component, options.name) if options.http is None else options.http,
    }


#: where each component's local HTTP listens unless told otherwise
HTTP_PORTS = {"gateway": 9101, "scheduler": 9102, "worker": 9103, "data": 9104}


def _local_http(component: str, name: str | None) -> str:
    """The address for local HTTP that ``init`` writes: on this machine alone. Several nodes of one kind on
    one machine are told apart by the number at the end of their names: ``worker-2`` is ten ports further up.
    """
    number = re.search(r"(\d{1,3})$", name or "")
    return f"127.0.0.1:{HTTP_PORTS[component] + 10 * max(0, int(number[1]) - 1 if number else 0)}"


def excluded_for(
    addresses: Iterable[str], given: list[str] | None, allowed: list[str] | None = None
) -> list[str] | None:
    """The default ``exclude_cidr`` without the networks that ``addresses`` lie in, and without those that are
    ``allowed``, or ``given`` without those; ``None``: as it is. Names are looked up: a gateway given by its
    name in a private network leads to direct connections as one given by its address does. A name that has no
    address here is printed. Raises ConfigError where one of ``allowed`` is no network.
    """
    from hypha.config.models import RESERVED_CIDR

    if allowed:
        return _without(given or excluded_for(addresses, None) or list(RESERVED_CIDR), allowed)
    if given:
        return given
    hosts = set[IPv4Address | IPv6Address]()
    for text in addresses:
        parts = text.split("/")
        if len(parts) > 2 and parts[1] in ("ip4", "ip6"):
            with contextlib.suppress(ValueError):
                hosts.add(ipaddress.ip_address(parts[2]))
        elif len(parts) > 2 and parts[1] in ("dns", "dns4", "dns6"):
            hosts |= _looked_up(parts[2])
    kept = [cidr for cidr in RESERVED_CIDR if not any(host in ipaddress.ip_network(cidr) for host in hosts)]
    return kept if len(kept) < len(RESERVED_CIDR) else None


def _without(excluded: list[str], allowed: list[str]) -> list[str]:
    kept = {cidr: ipaddress.ip_network(cidr) for cidr in excluded}
    for text in allowed:
        try:
            network = ipaddress.ip_network(text)
        except ValueError as exc:
            raise ConfigError(f"--allow-cidr {text}: it is no network such as 10.0.0.0/8: {exc}") from exc
        for cidr, other in list(kept.items()):
            if other.version != network.version or not other.overlaps(network):
                continue
            # of a network of which only a part is allowed the rest stays out
            parts = other.address_exclude(network) if network.subnet_of(other) else ()  # type: ignore[arg-type]
            del kept[cidr]
            kept |= {str(part): part for part in parts}
    return list(kept)


def _looked_up(name: str) -> set[IPv4Address | IPv6Address]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as exc:
        typer.echo(
            f"note: {name} has no address here now ({exc.strerror or exc}); if it is in a private network, "
            "take that out of exclude_cidr, or all traffic is relayed"
        )
        return set()
    return {ipaddress.ip_address(str(place[0]).partition("%")[0]) for *_, place in found}
