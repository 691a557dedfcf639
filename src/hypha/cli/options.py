"""The options that the four components' programs share, each written once.

A command takes a group of them as one parameter; with :func:`with_options` Typer sees the options of the
group in its place.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

DEFAULT_CONFIG = Path("config.toml")

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="TOML file; config.toml when there is one.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any key: KEY=VALUE, such as resources.memory=4. May be repeated."),
]


@dataclass(frozen=True, kw_only=True)
class IdentityOptions:
    """Where a node's identity lies."""

    cert: Annotated[Path | None, typer.Option(help="This node's certificate.")] = None
    key: Annotated[Path | None, typer.Option(help="Its private key.")] = None
    trust: Annotated[Path | None, typer.Option(help="The CAs to trust.")] = None
    crls: Annotated[Path | None, typer.Option(help="Revocation lists.")] = None


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """A node's place in the network."""

    gateway: Annotated[list[str] | None, typer.Option(help="A gateway's multiaddr. May be repeated.")] = None
    listen: Annotated[list[str] | None, typer.Option(help="Multiaddr to listen on. May be repeated.")] = None
    external: Annotated[list[str] | None, typer.Option(help="Multiaddr where others dial this node.")] = None
    exclude_cidr: Annotated[
        list[str] | None, typer.Option(help="Network never to dial. May be repeated.")
    ] = None
    http: Annotated[
        str | None,
        typer.Option(help="host:port for local HTTP: /health, and /status where there is."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class InitOptions(IdentityOptions, NetworkOptions):
    """What ``init`` writes for every component, and where."""

    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = DEFAULT_CONFIG
    name: Annotated[
        str | None,
        typer.Option("--name", "-n", help="Node name: certificates are <name>-cert.pem and so on."),
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False
    allow_cidr: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-cidr",
            help="Network to take out of the default exclude_cidr, such as 10.0.0.0/8. May be repeated.",
        ),
    ] = None
    pki: Annotated[
        Path,
        typer.Option(help="Directory with <name>-cert.pem, <name>-key.pem and <name>-trust.pem."),
    ] = Path()


@dataclass(frozen=True, kw_only=True)
class RunOptions(NetworkOptions):
    """The configuration that a component runs with, and what of it is overridden."""

    config: ConfigOption = None
    log_level: Annotated[
        str | None, typer.Option(help="A level, or a filter such as info,hypha_network=debug.")
    ] = None
    log_format: Annotated[str | None, typer.Option(help="auto, json or text.")] = None
    set_: SetOption = None


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """``command``, in which the options of a group stand in place of the parameter that is the group."""
    taken: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        group = parameter.annotation
        if not is_dataclass(group):
            taken.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = group
        hints = get_type_hints(group, include_extras=True)
        taken += [
            inspect.Parameter(
                option.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=option.default,
                annotation=hints[option.name],
            )
            for option in fields(group)
        ]

    @functools.wraps(command)
    def expanded(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{option.name: given.pop(option.name) for option in fields(group)})
        command(**given)

    expanded.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in taken}
    return expanded
