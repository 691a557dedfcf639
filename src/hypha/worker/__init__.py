"""The worker: offers what its machine has, runs executors for schedulers that hold a lease, and stands
between each executor and the network: bridge, connectors, slice cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from hypha.config.models import WorkerConfig
from hypha.messages import FinishedSpan, PeerRef

__all__ = ["run_worker"]


async def run_worker(
    config: WorkerConfig,
    *,
    emit_spans: Callable[[Sequence[FinishedSpan]], None] | None = None,
    alone: bool = False,
    task_status: trio.TaskStatus[PeerRef] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Work until cancelled; ``task_status`` gives this node once it listens and receives requests.
    ``emit_spans`` exports the spans of executors, and must not block; without, they record none. ``alone``:
    this process does nothing else, so it adopts and ends what executors leave behind
    (:mod:`hypha.worker.processes.keepers`), and lets none of this user's processes look into it.

    Cancelled, it kills its executors and is gone within 5 s. Raises ConfigError (IdentityError).
    """
    # The network takes a second to import; the keeper's and the bridge's parts do without.
    from hypha.worker.node import work

    await work(config, emit_spans, alone=alone, task_status=task_status)
