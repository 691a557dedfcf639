"""What a job's references name, fetched within the owner's allow-lists, and results stored.

- Fetches by URL: each address is judged by ``exclude_cidr`` after it was resolved, redirects too, and that
  one is connected to.
"""
