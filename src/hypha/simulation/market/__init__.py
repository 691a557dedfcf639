"""Many workers and schedulers that compete, with nothing but their decisions."""
