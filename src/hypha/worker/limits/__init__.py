"""What this machine has, and how an executor is held to what its lease reserved of it.

- What a machine has: ``worker/limits/detecting.py`` and ``gpus.py``; configuration only lowers.
  ``gpus`` gives GPUs to leases, ``cgroups``, ``quotas`` and ``usage`` are one means each, ``limits`` chooses
  among them for one executor.
- Job memory: enforced: cgroup v2, else v1, else rlimits; the log says which.
- What an executor wrote: is deleted by ``beneath.remove_tree`` alone; whatever of it blocks (hashing,
  listing, deleting) runs under a limiter of its own, never trio's default one.
"""
