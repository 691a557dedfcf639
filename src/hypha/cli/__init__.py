"""The commands: one file a program. Rooms are imported inside commands, so that ``--help`` is instant."""
