"""From observations to findings: pure functions, one module a subject."""
