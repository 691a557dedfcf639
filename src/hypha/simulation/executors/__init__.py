"""Executors of a simulated world: tasks that speak the bridge's messages and train a toy model with the real
outer step.
"""
