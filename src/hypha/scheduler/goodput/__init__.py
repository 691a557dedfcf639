"""What a job's time goes to: goodput, badput by reason, and how it gets over failures."""
