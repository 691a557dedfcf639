"""``hypha chaos``: a real local network that is killed, frozen and cut while it trains; its faults.

- ``hypha chaos``'s goodput: batches take a tenth of a second at least, so that nodes started again do not
  take the cores of those that train (each would have a machine of its own); samples of rounds that count, by
  wall clock, against calm stretches of the same job before and after: the faster of the two.
"""
