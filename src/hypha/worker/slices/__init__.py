"""Slices on their way to executors: fetched ahead, checked against the manifest, cached."""
