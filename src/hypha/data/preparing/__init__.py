"""From any source to a dataset that can be served."""
