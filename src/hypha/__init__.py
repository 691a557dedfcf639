"""Hypha pools ordinary, badly connected machines into one trainer (DiLoCo over libp2p)."""

__version__ = "0.1.0"
