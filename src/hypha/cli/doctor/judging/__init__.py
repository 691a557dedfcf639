"""From facts to findings: pure functions, one module a subject."""
