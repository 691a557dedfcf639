"""A data node: datasets announced, slices handed out and counted."""
