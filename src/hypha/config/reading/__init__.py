"""From files, ``HYPHA_*`` variables and flags to a checked configuration; templates of one."""
