"""``hypha-gateway``: the entry point of a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hypha.cli import component as common
from hypha.cli.excluding import excluded_for
from hypha.cli.running import run_program

PROGRAM = common.Program("gateway", "The entry point of a Hypha network; relays for nodes behind NAT.")
app = common.make_app(PROGRAM)

DEFAULT_ADDRESS = "/ip4/0.0.0.0/tcp/8080"


@app.command()
def init(
    output: common.OutputOption = common.DEFAULT_CONFIG,
    name: common.NameOption = None,
    force: common.ForceOption = False,
    listen: common.ListenOption = None,
    external: common.ExternalOption = None,
    gateway: common.GatewayOption = None,
    exclude_cidr: common.ExcludeOption = None,
    allow_cidr: common.AllowOption = None,
    http: common.HttpOption = None,
    pki: common.PkiOption = Path(),
    cert: common.CertOption = None,
    key: common.KeyOption = None,
    trust: common.TrustOption = None,
    crls: common.CrlsOption = None,
) -> None:
    """Write a configuration file with every key, its default and what it means."""
    given = {
        **common.identity_keys(name, PROGRAM, pki, (cert, key, trust, crls)),
        "listen_addresses": listen or [DEFAULT_ADDRESS],
        "external_addresses": external or ["/dns4/gateway.example.org/tcp/8080"],
        "gateway_addresses": gateway,
        "exclude_cidr": excluded_for([*(external or ()), *(gateway or ())], exclude_cidr, allow_cidr),
        "http_address": common.local_http(PROGRAM, name, http),
    }
    fill_in = {} if external else {"external_addresses": "where the nodes of your network dial this gateway"}
    common.write_config(PROGRAM, output, force, given, fill_in)


@app.command()
def run(
    config: common.ConfigOption = None,
    listen: common.ListenOption = None,
    external: common.ExternalOption = None,
    gateway: common.GatewayOption = None,
    exclude_cidr: common.ExcludeOption = None,
    http: common.HttpOption = None,
    log_level: common.LogLevelOption = None,
    log_format: common.LogFormatOption = None,
    set_: common.SetOption = None,
    max_circuits: Annotated[int | None, typer.Option(help="Relayed connections at once.")] = None,
) -> None:
    """Run until SIGINT or SIGTERM."""
    loaded = common.load(
        PROGRAM,
        config,
        [
            *common.flags(
                ("--listen", "listen_addresses", listen),
                ("--external", "external_addresses", external),
                ("--gateway", "gateway_addresses", gateway),
                ("--exclude-cidr", "exclude_cidr", exclude_cidr),
                ("--http", "http_address", http),
                ("--log-level", "log_level", log_level),
                ("--log-format", "log_format", log_format),
                ("--max-circuits", "max_circuits", max_circuits),
            ),
            *common.settings(PROGRAM, set_),
        ],
    )
    from hypha.cli.running import run_service
    from hypha.gateway import run_gateway

    async def service() -> None:
        await run_gateway(loaded)

    raise typer.Exit(run_service("hypha-gateway", loaded, service))


def main() -> None:
    """The program."""
    run_program(app)


if __name__ == "__main__":
    main()
