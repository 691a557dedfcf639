"""The bulk plane: files go whole and verified from node to node, or not at all.

``transfers`` is its face. A transfer is offered (``sending``), its two ends meet (``rendezvous``), and what
is said then (``wire``) goes over a direct connection or a libp2p stream (``connections``).

A file that is sent is offered: ``BulkOffer`` and ``BulkAnswer`` over RPC, then whoever can dial does; else a
libp2p stream, relayed if need be, with the same framing. The way that worked is remembered. Two transfers
each way at a time, the rest wait by token and hold nothing; who is told ``busy`` holds nothing either, and
asks again within a second.

Whoever wants a file asks for it (``WantFile``) over a bulk connection that it opens itself, and receives it
over that one (``pulling.py``, ``serving.py``); a provider that cannot be dialled, or is of an earlier version
(told by ALPN), is asked by a request to send it. A socket that has carried a file is kept for two minutes for
the next one, and the end that asked, else the one that sent, speaks first on it: one round trip instead of
five (``kept_connections.py``). When a transfer is tried again is decided in one place (``turns.py``). The
certificate at its other end is checked anew each time; where such a socket is dead, the file goes as if there
were none.

On a socket TLS proves both ends and carries their words; a file's bytes follow beside it, sealed with
AES-256-GCM in blocks of a megabyte under a key that the receiver makes for this file and says in ``Go``
(``blocks.py``): half the processor time of TLS's records. On a stream libp2p's own TLS carries all. The
receiver verifies (by BLAKE3; updates and theta, which come from whom they are of and go no further, by XXH3,
as the kind says and never the sender), then (checkpoint, export, model) fsyncs, renames, runs ``arrived``,
and only then acknowledges.

- Transfers at once: two each way; one in which nothing moved for 2 s lends its place, so that the dead do not
  hold up the living. The same file for the same receiver is one delivery.
- Which hash: a synchronisation passed the same bytes through BLAKE3 nine times, a quarter of its time; now
  once, for theta, whose BLAKE3 the ledger, reports and checkpoints keep. XXH3 (128 bits) tells damage at ten
  to twenty times the speed; who could forge an update could as well send another one.
- Caps on the line: one bucket a direction, shared by all bulk transfers and circuits; requests and leases
  take no part (``net/bulk/bandwidth.py``).
"""
