"""From any source to a dataset that can be served.

- What ``prepare`` chose, dropped or guessed: is one line each, with how to choose otherwise
  (``docs/data.md``); a data node locks what it serves against ``prepare --force``.
"""
