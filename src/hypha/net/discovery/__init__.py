"""How nodes find each other: provider records in the DHT, and requests on gossip topics."""
