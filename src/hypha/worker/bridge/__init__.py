"""Between an executor and the network: HTTP on a private Unix socket, and what waits there.

The contract is ``openapi.py``, also for machines (``GET /openapi.json``). Slices come from
``/resources/fetch`` with ``SchedulerData``, the model's files with ``Peers(resource="model")``; nobody's
acknowledgement of a file that was sent is 409 with the refusal's code, or 502. Paths cannot leave the job
directory, and are opened without following links; under bwrap what was fetched is read-only. Calls, streams
and events are bounded; a stream that nobody reads ends, and loses nothing when it is opened again.

Steering is level-triggered: directives state the whole of what they are about, ``Steer.seq`` grows and an
older one is ignored; events are numbered by process (``incarnation`` = the job directory's name) and repeated
until acknowledged. Job id, generation and round are in every envelope and every transfer; what is late is
refused. ``jobs/watch.py`` says which events are signs of life, and who owes them.
"""
