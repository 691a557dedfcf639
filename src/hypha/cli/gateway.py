"""``hypha-gateway``: the entry point of a network."""

from __future__ import annotations

from typing import Annotated

import typer

from hypha.cli import component as common
from hypha.cli.options import InitOptions, RunOptions, with_options
from hypha.cli.running import run_program, run_service

COMPONENT = "gateway"
app = common.make_app(COMPONENT, "The entry point of a Hypha network; relays for nodes behind NAT.")

DEFAULT_ADDRESS = "/ip4/0.0.0.0/tcp/8080"


@app.command()
@with_options
def init(options: InitOptions) -> None:
    """Write a configuration file with every key, its default and what it means."""
    given = {
        "listen_addresses": options.listen or [DEFAULT_ADDRESS],
        "external_addresses": options.external or ["/dns4/gateway.example.org/tcp/8080"],
    }
    fill_in = {"external_addresses": "where the nodes of your network dial this gateway"}
    common.write_config(COMPONENT, options, given, {} if options.external else fill_in)


@app.command()
@with_options
def run(
    options: RunOptions,
    max_circuits: Annotated[int | None, typer.Option(help="Relayed connections at once.")] = None,
) -> None:
    """Run until SIGINT or SIGTERM."""
    loaded = common.load_to_run(COMPONENT, options, ("--max-circuits", "max_circuits", max_circuits))
    from hypha.gateway import run_gateway

    raise typer.Exit(run_service("hypha-gateway", loaded, lambda: run_gateway(loaded)))


def main() -> None:
    run_program(app)


if __name__ == "__main__":
    main()
