"""Network namespaces for tests: see :mod:`hypha.cli.local.lab`, where they come from."""

from __future__ import annotations

from contextlib import AbstractContextManager, closing

from hypha.cli.local import lab
from hypha.cli.local.lab import Star, inside, interface, run

__all__ = ["Lab", "Star", "inside", "interface", "open_lab"]


class Lab(lab.Lab):
    """Networks of more than one address, whose cables can be pulled and whose packets can be counted."""

    def address(self, place: str, cable_to: str, address: str) -> None:
        """One more address at the end of a cable."""
        run("ip", "-n", place, "address", "add", address, "dev", interface(cable_to))

    def packets(self, place: str, counter: str) -> int:
        """What the named counter of table ``inet hypha`` has counted."""
        listed = run("ip", "netns", "exec", place, "nft", "list", "counter", "inet", "hypha", counter)
        return int(listed.split("packets")[1].split()[0])

    def plug(self, place: str, cable_to: str, up: bool) -> None:
        """Pull the cable out of ``place``, or put it back, with the routes that the kernel forgot."""
        run("ip", "-n", place, "link", "set", interface(cable_to), "up" if up else "down")


def open_lab() -> AbstractContextManager[Lab]:
    """Namespaces that are all gone when the block ends."""
    return closing(Lab())
