"""A job under its lease: one executor from its dispatch to its end, and what goes in and out."""
