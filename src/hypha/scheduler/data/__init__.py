"""Who serves the dataset of a job, and which worker trains on which of its slices."""
