"""Theta's way to those who train on it: in the background, from files that do not change any more."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from hypha.errors import PeerUnreachable, Refused
from hypha.executor.bridge.client import BridgeClient
from hypha.executor.files.tensors import Digests
from hypha.messages import PeerRef, Peers, SendCall

logger = logging.getLogger("hypha.executor.parameter_server")


class Broadcasts:
    """Eight at once, each from a link of its own; ``ended`` is called with each that has ended. ``span_of`` a
    round is the one in which its theta is sent.
    """

    def __init__(
        self,
        bridge: BridgeClient,
        ended: Callable[[Future[Any]], None],
        span_of: Callable[[int], AbstractContextManager[object]],
    ) -> None:
        self._bridge = bridge
        self._ended = ended
        self._span_of = span_of
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="theta")
        self._links = 0

    def send(
        self,
        path: Path,
        peers: tuple[PeerRef, ...],
        round_: int,
        contributors: tuple[str, ...],
        digests: Digests,
        attempt: int = 0,
    ) -> None:
        """Send the file of theta of ``round_`` at ``path``, whose name may be taken away at once."""
        if not peers:
            return
        # under a name of its own, which whoever sends it removes afterwards
        self._links += 1
        link = path.parent / f"{self._links}" / path.name
        link.parent.mkdir(parents=True)
        os.link(path, link)
        call = SendCall(
            resource=Peers(peers=peers, strategy="all", resource="theta"),
            path=self._bridge.relative(link),
            round=round_,
            contributors=contributors,
            blake3=digests.blake3,
            attempt=attempt,
            xxh3=digests.xxh3,
        )
        self._threads.submit(self._send, call, link).add_done_callback(self._ended)

    def _send(self, call: SendCall, link: Path) -> None:
        """The worker has tried long enough when it reports a failure: whoever still takes part is missed by
        the scheduler, which says ``SendModel``, or gives it up.
        """
        try:
            with self._span_of(call.round):
                sent = self._bridge.send(call)
            for delivery in sent.deliveries:
                if not delivery.acknowledged:
                    text = f"{delivery.detail} ({delivery.error})"
                    logger.warning("Theta of round %d did not reach %s: %s", call.round, delivery.peer, text)
        except (Refused, PeerUnreachable) as exc:
            logger.warning("Theta of round %d reached nobody: %s", call.round, exc)
        finally:
            shutil.rmtree(link.parent, ignore_errors=True)
