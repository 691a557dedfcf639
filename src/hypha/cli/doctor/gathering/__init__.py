"""Observations: input and output, each within a bounded time. What could not be found out is one, too."""
