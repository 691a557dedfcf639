"""All observations, at the same time as far as they do not disturb each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import trio

from hypha.cli.doctor.gathered import (
    IdentityObservations,
    MachineObservations,
    Observations,
    ServiceObservations,
)
from hypha.cli.doctor.gathering.bounded import Gathering
from hypha.cli.doctor.gathering.identity import gather_identity
from hypha.cli.doctor.gathering.machine import gather_machine
from hypha.cli.doctor.gathering.model import parameters_of
from hypha.cli.doctor.gathering.network import Around, gather_network
from hypha.cli.doctor.gathering.served import gather_served
from hypha.cli.doctor.subject import Subject
from hypha.config.job import DatasetRef
from hypha.config.models import DataConfig
from hypha.errors import HyphaError
from hypha.pki.identity import Identity
from hypha.runtime import in_thread

A = TypeVar("A")
T = TypeVar("T")

_NETWORK = "the network"
IDENTITY_S, SERVED_S, MODEL_S = 10.0, 20.0, 10.0


@dataclass(frozen=True)
class Subjects:
    """What else to look at: addresses of ``peers``, a ``dataset``; and, ``offline``, nothing beyond this
    machine.
    """

    peers: Sequence[str] = ()
    dataset: DatasetRef | None = None
    offline: bool = False


async def gather(subject: Subject, wanted: Subjects) -> Observations:
    """All observations of ``subject``."""
    gathering = Gathering()
    identity_observations, identity = None, None
    if subject.files is not None:
        files = subject.files
        identity_observations, identity = await gathering.within(
            IDENTITY_S, "the identity", lambda: _in_thread(gather_identity, files)
        ) or (None, None)
    machine: list[MachineObservations] = []
    around: list[Around] = []
    served: list[ServiceObservations] = []
    parameters: list[int | None] = []

    async def look_at_machine() -> None:
        machine.append(await gather_machine(gathering, subject.config))

    async def look_at_network(found: Identity) -> None:
        if subject.config is None:
            return
        try:
            around.append(
                await gather_network(gathering, subject, subject.config, found, wanted.peers, wanted.dataset)
            )
        except HyphaError as exc:
            # such as a port that somebody has taken since it was looked at
            gathering.note(_NETWORK, str(exc))

    async def look_at_data(config: DataConfig) -> None:
        found = await gathering.within(
            SERVED_S,
            "the datasets to serve",
            lambda: _in_thread(gather_served, config),
        )
        served.extend([found] if found is not None else [])

    async def look_at_model() -> None:
        if (job := subject.job) is not None:
            parameters.append(
                await gathering.within(MODEL_S, "the model's size", lambda: _in_thread(parameters_of, job))
            )

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look_at_machine)
        nursery.start_soon(look_at_model)
        if isinstance(subject.config, DataConfig):
            nursery.start_soon(look_at_data, subject.config)
        if identity is not None and not wanted.offline:
            nursery.start_soon(look_at_network, identity)
    told = any(one.what == _NETWORK for one in gathering.unknown)
    if not around and not told and not wanted.offline and subject.path is not None:
        gathering.note(_NETWORK, _why_not(subject, identity_observations))
    return Observations(
        machine=machine[0],
        identity=identity_observations,
        network=around[0].network if around else None,
        dataset=around[0].dataset if around else None,
        running=around[0].running if around else None,
        parameters=next(iter(parameters), None),
        served=_announced(served, around),
        unknown=tuple(gathering.unknown),
    )


async def _in_thread(call: Callable[[A], T], argument: A) -> T:
    """As :func:`in_thread`; a call that hangs is left behind."""
    return await in_thread(call, argument, abandon_on_cancel=True)


def _why_not(subject: Subject, identity: IdentityObservations | None) -> str:
    if subject.config is None:
        return "the configuration is not valid"
    return "this node has no identity" if identity is None else "its identity cannot be used"


def _announced(served: list[ServiceObservations], around: list[Around]) -> ServiceObservations | None:
    """A running data node counts the announcements that gateways have taken."""
    if not served:
        return None
    running = around[0].running if around else None
    if running is None or running.announcements is None:
        return served[0]
    return replace(served[0], announced=running.announcements > 0)
