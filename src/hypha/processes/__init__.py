"""Child processes: what keeps one, what a fork of one gives up, and what libraries import in vain."""
