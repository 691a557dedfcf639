"""The scheduler: the only authority on a job, from finding workers to the published model."""
