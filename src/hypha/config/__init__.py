"""Configuration: what each component can be told, and how files, environment and flags are layered."""
