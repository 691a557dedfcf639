"""Which nodes may serve a job's dataset: those with the role ``data``, of them those that the job names."""

from __future__ import annotations

from dataclasses import dataclass

from hypha.access import SERVICES, carries, may_act_as
from hypha.config.job import DatasetRef
from hypha.node import Node


@dataclass(frozen=True)
class Pins:
    """A job's data nodes, by the organisations that vouch for them, or by PeerID; with neither, all."""

    organizations: frozenset[str] = frozenset()
    data_nodes: frozenset[str] = frozenset()

    @classmethod
    def of(cls, wanted: DatasetRef) -> Pins:
        """As the job's configuration says."""
        return cls(frozenset(wanted.organizations), frozenset(wanted.data_nodes))

    def problem(self, node: Node, peer: str) -> str | None:
        """Why ``peer``, which is or was connected, is not used, in words. PeerUnreachable when it was not."""
        has = node.roles_of(peer)
        if not may_act_as(has, SERVICES["dataset"].by):
            # with other data under the name it would stop every job
            return f"is no data node: its certificate has {carries(has)}"
        if (not self.organizations and not self.data_nodes) or peer in self.data_nodes:
            return None
        organization = node.organization_of(peer)
        if organization in self.organizations:
            return None
        if not self.organizations:
            return "is not among scheduler.job.dataset.data_nodes"
        return f"is of {organization!r}, which scheduler.job.dataset.organizations does not name"
