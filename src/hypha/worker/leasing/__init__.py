"""Who gets this machine, at what price and for how long."""
