"""``hypha chaos``: a real local network that is killed, frozen and cut while it trains; its faults."""
