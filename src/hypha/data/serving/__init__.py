"""A data node's life: datasets announced, slices handed out and counted."""
