"""Leases as the scheduler holds them: which offers to take, when to renew, whom to let go.

- What a job needs of a worker's version: follows from its description (``features.words``); each new field or
  value of a description is a feature, or may be ignored: a test asks.
"""
