"""What of libp2p is never imported: transports, ciphers and ways of discovery that Hypha does not use.

libp2p imports everything that it has, and with it QUIC, ACME, two HTTP clients, WebSockets, mDNS and a DNS
resolver: half of the processor time that importing it takes, a quarter of a node's start, and 25 MB in every
process. Here they are replaced, before libp2p is imported, by modules whose every name is a class that does
nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: with all that is below them
UNUSED = (
    "libp2p.discovery.mdns",
    "libp2p.security.noise",
    "libp2p.security.secio",
    "libp2p.security.tls.autotls",
    "libp2p.transport.quic",
    "libp2p.transport.websocket",
    # names are resolved as the system does it (hosts file included): see ``dialing``
    "multiaddr.resolvers",
)


class _Unused(Exception):
    """Can be subclassed, caught, compared with and made, as modules do while they are imported; no more."""

    def __init__(self, *arguments: object, **keywords: object) -> None:
        super().__init__()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        where = type(self)
        raise RuntimeError(f"{where.__module__}.{where.__name__} is not used by Hypha: see {__name__}")


class _Absent(ModuleType):
    """Has every public name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (_Unused,), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if any(fullname == name or fullname.startswith(f"{name}.") for name in UNUSED):
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing in it."""


def install() -> None:
    """Do so from now on; modules that were imported before stay what they are."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


install()
