"""Executors of a simulated world: the code of real ones, as tasks, on a toy model, with the handlers of their
worker in place of HTTP.
"""
