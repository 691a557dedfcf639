"""Copies of checkpoints that this worker keeps for schedulers."""
