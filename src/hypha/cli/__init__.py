"""One file a program. Other packages are imported inside commands, so that ``--help`` is instant."""
