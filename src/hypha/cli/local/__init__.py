"""A network of real processes on this machine, for the demo, for ``hypha chaos`` and for tests."""
