"""The outer step of DiLoCo: which updates count, how they add up, what comes of theta.

- A parameter server that goes on from a checkpoint: takes theta's shapes from it; the model is fetched
  meanwhile and built when it is exported, as building it takes longer than all the rest.
- Outer optimizer: what the configuration leaves open is chosen when a job begins (``config/job.py``,
  ``docs/defaults.md``), is in its ledger, and stays for good: restored, extended or upgraded, it is replayed
  bit by bit.
- Outliers: an update over ten times the median norm is scaled down to the median of the last four rounds;
  without history the first updates wait on disk for their own median. The factor is in the ledger, and replay
  takes it from there; buffers are bounded in the same way, one by one.
- Replay: equal bit by bit on like machines: order of sums and thread counts are in the ledger; Adam turns
  rounding noise into steps.
"""
