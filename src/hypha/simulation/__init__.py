"""A whole network in memory, under a virtual clock: the real scheduler, workers and data nodes, a simulated
network, the real executors as tasks, on a toy model, faults at chosen moments, and what must be true after.

``scenario`` says what happens, ``world`` makes it, ``faults`` strikes, ``invariants`` checks, ``search`` runs
many and shrinks one that fails. One seed is one run, byte for byte.
"""
