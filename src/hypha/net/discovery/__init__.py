"""How nodes find each other: provider records in the DHT, and requests on gossip topics.

- Who is a data node: a certificate with the role ``data``: gateways take announcements of datasets from
  nobody else; copies of checkpoints have keys of their own, for workers.
- Who may publish: the publisher's certificates travel with its request for workers, and are judged before it
  is passed on or taken.
"""
