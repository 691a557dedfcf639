"""What a job's time goes to: goodput, badput by reason, and how it gets over failures. Both add up
to places times wall clock (``machine``); counters get what cannot change any more (``signals``).
"""
