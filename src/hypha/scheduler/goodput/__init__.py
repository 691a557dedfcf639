"""What a job's time goes to: goodput, badput by reason, and how it gets over failures.

- Goodput: seconds of wanted worker places that became updates which count; badput by reason; both add up to
  places times wall clock. Only what a checkpoint has made certain goes into the counters, as they cannot go
  back.
"""
