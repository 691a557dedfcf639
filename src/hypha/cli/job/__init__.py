"""Commands and pages about one job: running, following, reporting and repeating it."""
