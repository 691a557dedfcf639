"""``hypha demo``: a whole network on this machine, of real processes, that trains a real model."""
