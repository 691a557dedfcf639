"""The worker: offers what its machine has, runs executors for schedulers that hold a lease, and stands
between each executor and the network: bridge, connectors, slice cache.
"""
