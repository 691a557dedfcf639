"""Caps on what the bulk plane sends and receives (``[limits]``): a bucket for each direction.

:class:`Bucket` is pure: it is told what has moved and when, and says how long to wait. Whoever moves bytes
does so in portions of a twentieth of a second, and waits after each for as long as it is told; as everybody
stands in the same line, transfers get equal shares, and a portion never waits for a whole block of another.
Words, requests, leases and gossip take no part in it: they go at once, over a line that the caps keep free.
A node without caps has no buckets, and moves bytes as if this were not here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import datetime

import trio

from hypha.config.tuning import LimitsConfig
from hypha.telemetry.instruments import CAPPED

logger = logging.getLogger(__name__)

#: A portion is what goes within this.
PORTION_S = 0.05
#: Waits end late, by milliseconds where the machine is busy: so much of what was missed is made up for. It is
#: also the burst with which a transfer begins.
CREDIT_S = 0.1
LEAST_PORTION_BYTES = 2 << 10
MOST_PORTION_BYTES = 256 << 10
#: The schedule is looked at this often.
LOOK_S = 1.0
#: A relay cannot see what it carries. What comes in pieces no longer than this is taken for words, and passed
#: on at once; it is counted all the same.
WORD_BYTES = 1 << 10
#: What waits in a relay is through within this, where that is enough for the journey to the sender and back.
WINDOW_S = 0.1
LEAST_WINDOW_BYTES = 32 << 10


class Bucket:
    """How long to wait after so many bytes, at ``rate`` bytes a second (None: no wait). Not thread-safe."""

    def __init__(self, rate: float | None) -> None:
        self.rate = rate
        #: when all that has moved so far would have, at the rate
        self._paid_at = float("-inf")

    @property
    def portion(self) -> int:
        """So many bytes may be moved at a time."""
        if self.rate is None:
            return MOST_PORTION_BYTES
        return int(min(max(self.rate * PORTION_S, LEAST_PORTION_BYTES), MOST_PORTION_BYTES))

    def set_rate(self, rate: float | None, now: float) -> None:
        """From ``now`` on. What is owed stays owed, and is paid at the new rate where that is higher: nobody
        waits longer than it was told, or a connection would stand still for so long that it is given up.
        """
        if self.rate is not None and rate is not None and self._paid_at > now:
            self._paid_at = now + (self._paid_at - now) * min(1.0, self.rate / rate)
        elif rate is None:
            self._paid_at = float("-inf")
        self.rate = rate

    def take(self, count: int, now: float) -> float:
        """``count`` bytes have moved: seconds until the next may. Each caller waits for those before it."""
        if self.rate is None:
            return 0.0
        self._paid_at = max(self._paid_at, now - CREDIT_S) + count / self.rate
        return max(0.0, self._paid_at - now)


class Cap(Bucket):
    """One direction of a node, from any thread. ``rate_now`` gives the bytes a second in force."""

    def __init__(
        self,
        direction: str,
        rate_now: Callable[[], float | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(rate_now())
        self._direction = direction
        self._rate_now = rate_now
        self._clock = clock
        self._lock = threading.Lock()
        self._look_at = clock() + LOOK_S

    def owed_s(self, count: int) -> float:
        """``count`` bytes have moved: seconds that the caller has to wait before it moves more."""
        with self._lock:
            now = self._clock()
            if now >= self._look_at:
                self._look_at = now + LOOK_S
                if (rate := self._rate_now()) != self.rate:
                    self.set_rate(rate, now)
                    logger.info("Transfers: %s %s from now on ([limits]).", self._direction, in_words(rate))
            wait_s = self.take(count, now)
        if wait_s:
            CAPPED.add(wait_s, direction=self._direction)
        return wait_s

    def wait(self, count: int) -> None:
        """The same, and wait in this thread."""
        if wait_s := self.owed_s(count):
            time.sleep(wait_s)

    async def sleep(self, count: int) -> None:
        """The same, in the event loop."""
        if wait_s := self.owed_s(count):
            await trio.sleep(wait_s)


class Caps:
    """Those of a node: ``up`` and ``down``, None where there never is one."""

    def __init__(
        self, limits: LimitsConfig | None = None, today: Callable[[], datetime] = datetime.now
    ) -> None:
        self._limits = limits or LimitsConfig()
        self._today = today
        self.up = Cap("outbound", lambda: self._in_force()[0]) if self._limits.caps_upload else None
        self.down = Cap("inbound", lambda: self._in_force()[1]) if self._limits.caps_download else None

    def details(self) -> dict[str, str]:
        """What a node's health says of them; nothing where there never is one."""
        if self.up is None and self.down is None:
            return {}
        up, down = self._in_force()
        return {"bandwidth": f"sent {in_words(up)}, received {in_words(down)}"}

    def _in_force(self) -> tuple[float | None, float | None]:
        """Bytes a second that may be sent and received now."""
        local = self._today()
        up, down = self._limits.at(local.weekday(), 60 * local.hour + local.minute + local.second / 60)
        return _bytes_a_second(up), _bytes_a_second(down)

    @property
    def splice_bytes(self) -> int | None:
        """So much may a relay pass on at a time; None: as much as it likes."""
        found = [cap.portion for cap in (self.up, self.down) if cap is not None]
        return min(found) if found else None

    @property
    def window_bytes(self) -> int | None:
        """So much of a circuit may wait in a relay, in the way of requests; None: as much as they like."""
        rates = [cap.rate for cap in (self.up, self.down) if cap is not None and cap.rate is not None]
        return max(LEAST_WINDOW_BYTES, int(min(rates) * WINDOW_S)) if rates else None

    async def relayed(self, count: int) -> None:
        """A relay has received ``count`` bytes and sent them on: wait as long as both directions want."""
        waits = [cap.owed_s(count) for cap in (self.up, self.down) if cap is not None]
        if count > WORD_BYTES and waits and (wait_s := max(waits)):
            await trio.sleep(wait_s)


def in_words(rate: float | None) -> str:
    """A rate in bytes a second, for people."""
    return "as much as goes" if rate is None else f"{rate * 8 / 1e6:g} Mbit/s"


def _bytes_a_second(mbit: float | None) -> float | None:
    return None if mbit is None else mbit * 1e6 / 8
