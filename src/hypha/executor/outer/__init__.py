"""The outer step of DiLoCo: which updates count, how they add up, what comes of theta.

- Outer optimizer: what the configuration leaves open is chosen when a job begins (``config/job.py``,
  ``docs/defaults.md``), is in its ledger, and stays for good: restored, extended or upgraded, it is replayed
  bit by bit.
- Outliers: ``admission.py``, ``buffers.py``.
- Replay: equal bit by bit on like machines: order of sums and thread counts are in the ledger; Adam turns
  rounding noise into steps.
"""
