"""Between an executor and the network: HTTP on a private Unix socket, and what waits there.

``GET /job`` the job, secrets included; ``POST /resources/fetch`` FetchCall -> [FetchedFile]; ``POST
/resources/send`` SendCall -> Sent, once anybody has acknowledged, with what became of it at each receiver
(409 with the refusal's code or 502 when nobody did); a directory goes to a ``Local`` place only; ``POST
/resources/receive`` ReceiveCall -> SSE of ReceivedFile, repeated on reconnect until the executor deletes the
file; ``GET /directives`` SSE, the newest of each type first (``SendModel``: of each receiver); ``POST
/status/send`` StatusCall; ``POST /spans``; ``GET /openapi.json``. Slices come from ``/resources/fetch`` with
``SchedulerData``, the model's files with ``Peers(resource="model")``. Paths cannot leave the job directory,
and are opened without following links; under bwrap what was fetched is read-only. Calls, streams and events
are bounded (503 ``busy``); a stream that nobody reads ends, and loses nothing when it is opened again.

A sign of life is any event, and ``alive``, which goes no further than the worker: said about once a second,
by the thread that works otherwise, while it waits. Who owes signs and gives none for ``hang_s`` is killed and
reported like any executor that ended. Hypha's own owe them, and those whose ``[[executors]]`` entry has a
``hang_s``, from the start; any other from its first ``alive``. Calls and output are no signs: a prefetching
thread makes them beside a dead loop. Nobody is judged while the worker itself stood still, and until
``loaded`` or ``model-ready`` 300 s are the least.

Steering is level-triggered: directives state the whole of what they are about, ``Steer.seq`` grows and an
older one is ignored; events are numbered by process (``incarnation`` = the job directory's name) and repeated
until acknowledged. Job id, generation and round are in every envelope and every transfer; what is late is
refused.
"""
