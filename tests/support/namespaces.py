"""Network namespaces for tests: see :mod:`hypha.cli.local.lab`, where they come from."""

from hypha.cli.local.lab import Lab, Star, inside, interface, open_lab

__all__ = ["Lab", "Star", "inside", "interface", "open_lab"]
