"""What libraries import and Hypha never uses: it is left out, which halves the start of a node.

libp2p imports everything that it has, and with it QUIC, ACME, two HTTP clients, WebSockets, mDNS, a DNS
resolver and ciphers for keys that no node has; Hypercorn imports HTTP/2 and WebSockets. Such modules are
replaced, before the library is imported, by modules whose every name is a class that does nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class LeftOut(ValueError):
    """Something that was left out was used after all, because of what a peer has sent, a key of another kind
    for example: libraries expect a ValueError of such.
    """


class _Stand(Exception):
    """Can be subclassed, caught, compared with and made, as modules do while they are imported; no more."""

    def __init__(self, *arguments: object, **keywords: object) -> None:
        super().__init__()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        where = type(self)
        raise LeftOut(f"{where.__module__}.{where.__name__} is not used by Hypha: see {__name__}")


class _Absent(ModuleType):
    """Has every public name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (_Stand,), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


class _Finder(MetaPathFinder, Loader):
    names: tuple[str, ...] = ()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if any(fullname == name or fullname.startswith(f"{name}.") for name in self.names):
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing in it."""


_finder = _Finder()


def leave_out(*names: str) -> None:
    """Do so with these modules, and all below them, from now on; what was imported before stays."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.names += names
