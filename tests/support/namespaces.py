"""Network namespaces for tests: see :mod:`hypha.cli.chaos.lab`, where they come from."""

from hypha.cli.chaos.lab import Lab, Star, inside, interface, open_lab

__all__ = ["Lab", "Star", "inside", "interface", "open_lab"]
