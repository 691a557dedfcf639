"""``hypha``: what concerns a whole network, a whole job or any node: the demo, faults, the doctor, a job's
status, its replay, its time line and its report; who is in the network, where, and who holds which lease.
"""

from __future__ import annotations

import typer

from hypha.cli.chaos.command import chaos
from hypha.cli.demo.command import demo
from hypha.cli.doctor.command import doctor
from hypha.cli.job.replay import replay
from hypha.cli.job.report import report
from hypha.cli.job.status import status
from hypha.cli.job.timeline import timeline
from hypha.cli.leases import leases
from hypha.cli.lookups import lookup, peers
from hypha.cli.running import run_program

app = typer.Typer(
    name="hypha",
    help="Pools ordinary, badly connected machines into one trainer.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(chaos)
app.command()(doctor)
app.command()(status)
app.command()(replay)
app.command()(timeline)
app.command()(report)
app.command()(peers)
app.command()(lookup)
app.command()(leases)


@app.command()
def version() -> None:
    """Print the version."""
    from hypha import __version__

    typer.echo(f"hypha {__version__}")


def main() -> None:
    """The program."""
    run_program(app)


if __name__ == "__main__":
    main()
