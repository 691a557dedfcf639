"""Configuration: the keys of each component, and how files, environment and flags are layered."""
