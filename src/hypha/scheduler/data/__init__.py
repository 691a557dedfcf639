"""Who serves the dataset of a job, and which worker trains on which of its slices.

- Who trains on which slice: in the ledger before the worker hears of it; changes by loss follow within a
  tenth of a second. A worker that starts over says with its next question from which question on it still
  holds slices (``held_from``), so none stays assigned to nobody.
- Which data, where replicas differ: the pinned manifest hash, else the ledger's, else what most serve; the
  scheduler recomputes the hash; a tie in a new job is decided after ten seconds: the scheduler's own
  organisation's, else the smaller hash, and both are named.
"""
