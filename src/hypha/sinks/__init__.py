"""Metric sinks: where researchers watch a job's curves, in the tool that they have.

A sink gets the figures of each applied round. It runs in a process of its own (``child``), because the
libraries behind it print, keep global state, read the environment (trackio), wait for servers as long as
they like and hold up the end of whoever imported them (wandb, for 11 s). The scheduler's end of it
(``process``) never blocks: rounds wait in a bounded queue, a sink that fails or hangs is ended and started
again, and the log says so once.

Another sink is a class with the methods of :class:`~hypha.sinks.child.MetricSink`, and a line in
``child.SINKS``.
"""

from hypha.sinks.interface import Destination, RoundValues, RunInfo
from hypha.sinks.process import SinkProcess

__all__ = ["Destination", "RoundValues", "RunInfo", "SinkProcess"]
