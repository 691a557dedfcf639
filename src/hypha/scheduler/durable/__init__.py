"""What outlives a scheduler: ledger, checkpoints and their copies, the published model."""
