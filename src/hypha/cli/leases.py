"""``hypha leases``: the leases that a worker has given, or that a scheduler holds, from its local HTTP."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from hypha.cli.job.live import shown
from hypha.cli.lookups import (
    JsonOption,
    NotThere,
    add_row,
    any_component,
    ask_local,
    print_json,
    print_table,
    table_of,
)
from hypha.cli.options import ConfigOption
from hypha.errors import HyphaError
from hypha.naming import shown as named_peer
from hypha.scheduler.status.snapshot import JobSnapshot
from hypha.worker.leasing.given import GivenLeases


def leases(
    address: Annotated[
        str | None,
        typer.Argument(help="A worker's or scheduler's http_address; default: the configuration's."),
    ] = None,
    config: ConfigOption = None,
    json_: JsonOption = False,
) -> None:
    """Show the leases that a worker has given, or that a scheduler holds."""
    if address is None:
        loaded = any_component(config)
        if loaded.http_address is None:
            raise HyphaError(
                "its http_address is not set, and leases are told there: set it, or name an address"
            )
        address = loaded.http_address
    try:
        given = ask_local(address, "leases", GivenLeases)
    except NotThere:
        _show_held(ask_local(address, "status", JobSnapshot), json_)
        return
    if json_:
        print_json(given)
        return
    print(shown(f"the worker {given.state}; free are {_resources(given.free)}").plain)
    if (price := given.price) is not None:
        load = f"{price.strategy}, load {100 * price.load:.0f} %"
        told = f"it asks for {price.asked:g} a lease: {price.rest:g} at rest, floor {price.floor:g}, {load}"
        print(shown(told).plain)
    table = table_of("lease", "scheduler", "for", "state", "reserved", "price", "expires in", "job")
    for one in given.leases:
        add_row(
            table,
            (
                one.lease[:8],
                named_peer(one.scheduler, one.name),
                f"{one.kind} ({one.executor})",
                one.state,
                _resources(one.resources),
                f"{one.price:g}",
                f"{one.expires_in_s:.0f} s",
                one.job,
            ),
        )
    print_table(table)


def _show_held(job: JobSnapshot, json_: bool) -> None:
    if json_:
        print_json(job.held)
        return
    print(shown(f"job {job.name} holds {len(job.held)} leases").plain)
    table = table_of("lease", "worker", "for", "state", "reserved", "price", "expires in")
    for one in job.held:
        leaves = "" if one.leaves_in_s is None else f"leaves in {one.leaves_in_s:.0f} s"
        reserved = {"cpu": one.cpu, "memory": one.memory, "gpu": one.gpu, "storage": one.storage}
        add_row(
            table,
            (
                one.lease[:8],
                named_peer(one.peer, one.name),
                one.kind,
                leaves or ("unreachable" if one.suspected else "held"),
                " ".join(f"{name}={amount:g}" for name, amount in reserved.items() if amount),
                f"{one.price:g}",
                f"{one.expires_in_s:.0f} s",
            ),
        )
    print_table(table)


def _resources(resources: msgspec.Struct) -> str:
    amounts = msgspec.structs.asdict(resources)
    return " ".join(f"{name}={amount:g}" for name, amount in amounts.items() if amount) or "nothing"
