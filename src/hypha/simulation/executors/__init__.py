"""Executors of a simulated world: the code of real ones, as tasks, on a toy model. Their worker's handlers are
in place of HTTP.
"""
