"""The round machine: who takes part, when a round is planned, closed and applied. Pure.

- What is reported after a ``Rejoin``: everything again: a training executor ``Loaded`` and ``RoundStarted``;
  a parameter server ``UpdateReceived`` of the last round and its ``RoundApplied`` and ``CheckpointSaved``,
  ``ModelReady``, and each ``UpdateReceived`` of the open round. A round that was applied while nobody
  received it is recorded then.
- A round that nobody contributed to: is never applied by the scheduler; the parameter server would leave
  theta and momentum as they are.
- Left out or refused three rounds in a row: the worker is replaced. In the third round, one that theta has
  not reached yet is waited for until the deadline, as rounds may be shorter than the way to it; rounds in
  which it cannot be reached do not count, its lease does.
- A training executor failed (its own error, its end, a hang): the others do its part; what it said and how it
  ended are one failure. It is started again under the same lease after 0.2, 0.8, 3.2 .. s (60 at most), with
  jitter, ``executor_restarts`` times since the last applied round with its update; then, and at once for a
  model error, its worker is replaced.
- A late report of an executor that is over: is refused by its incarnation; a dispatch names the one that it
  replaces (``instead_of``), so it may be repeated.
- Executors failing without an applied round in between: five, and ``executor_restarts`` more, end the job
  with the last message; the same message of a model or a batch (numbers apart) from two workers, from two
  executors of a lone worker or from two parameter servers ends it at once; three on two workers with a loss
  that is not finite (five on one).
- The start of a generation: ``num_workers`` with the model, or ``min_workers`` once ``start_grace_s`` has
  passed; who comes later joins.
"""
