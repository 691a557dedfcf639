"""The messages that all components share: between nodes, and between a worker and its executor.

All are msgspec Structs: MessagePack on the wire, JSON over an executor's bridge, the same shapes in
both. Tags are kebab-case in the field ``type``. Durations cross the wire, never wall-clock times.
Reports and directives are *level-triggered*: each states the whole of what it is about (counts so far
in the round, the plan for the round), so that a lost, repeated or reordered one does no harm.

One module a subject; whatever is public in one of them is imported from here.
"""

from hypha.messages.bridge import *
from hypha.messages.data import *
from hypha.messages.envelopes import *
from hypha.messages.events import *
from hypha.messages.jobs import *
from hypha.messages.leases import *
from hypha.messages.ledger import *
from hypha.messages.nodes import *
from hypha.messages.transfers import *
from hypha.messages.values import *
