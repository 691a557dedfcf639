"""The bulk plane: files go whole and verified from node to node, or not at all.

``transfers`` is its face. A transfer has a connection of its own, so that ten gigabytes do not delay the
renewal of a lease. What is said on it stands in ``wire``, how its ends meet in ``rendezvous`` (the way that
worked is remembered in ``ways``).

- Whoever has a file to send offers it (``sending``, ``receiving``), and whoever wants one asks for it
  (``pulling``, ``sending``), over a connection that it opens itself: it dials, or asks to be dialled, or
  opens a libp2p stream, relayed if need be, with the same framing (``rendezvous``). Two transfers each way at
  a time; one in which nothing moved for 2 s lends its place, so that the dead do not hold up the living
  (``turns``). The rest wait on their connections; who is told ``busy`` asks again within a second. What was
  cut goes on where it was cut. The same file for the same receiver is one delivery.
- A socket that has carried a file is kept for two minutes for the next one: one round trip instead of four
  (``kept_connections``). The certificate at its other end is checked anew each time; where such a socket is
  dead, the file goes as if there were none.
- On a socket TLS proves both ends and carries their words; a file's bytes follow beside it, sealed
  (``blocks``): half the processor time of TLS's records. On a stream libp2p's own TLS carries all.
- The receiver verifies (``inbound``, ``files``), by BLAKE3; updates and theta, which come from whom they are
  of and go no further, by XXH3, as the kind says and never the sender. Then (checkpoint, export, model) it
  fsyncs, renames, runs ``arrived``, and only then acknowledges. Why two hashes: a synchronisation passed the
  same bytes through BLAKE3 nine times, a quarter of its time; now once, for theta, whose BLAKE3 the ledger,
  reports and checkpoints keep. XXH3 (128 bits) tells damage at ten to twenty times the speed; who could forge
  an update could as well send another one.
- Caps on the line: one bucket a direction, shared by all bulk transfers and circuits; requests and leases
  take no part (``net/bandwidth.py``).
"""
