"""Who gets this machine, at what price and for how long.

Offers are at max(price, bid); above the bid they are counter-offers. In a window the order is bid,
preference, age by weighted unit; before it begins, a job that holds what others ask for gives way, the
younger one first (``docs/prices.md``). A worker that ends says so once a second (``WorkerLeaving``): another
one is looked for at once, the round machine caps its plan, and what is leased still is handed back. Expiry is
for those who can say nothing.

Request (gossip, repeated while workers are missing) -> temporary lease and offer -> ranking by capacity for
the price -> acceptance by the first renewal -> renewals at 75 % of a lease's time. Expiry always suffices to
free what is leased, a release only makes it sooner. The scheduler counts a lease's time from when it *sent*
the renewal, so it never believes in a lease that the worker has ended. An offer states version and features,
a request what the job needs; who lacks a feature is declined (``unsupported``, cause ``features``), and who
states no version has those of the baseline.

- A machine that is taken away: an early update counts and hurries nobody; a parameter server saves itself and
  moves when another lease is there, after the round where a leaving worker's update is only in it.
- Telling a worker that runs here: a Unix socket in its work directory: file mode decides, no browser reaches
  it.
"""
