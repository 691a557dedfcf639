"""Staying connected to gateways.

A leaf knows several and uses one: when it is lost the next is tried at once, and only when none answers
does it pause, longer each time. (Being meshed with all of them costs everybody's CPU and delivers later.)
A gateway keeps a link to each of the others. Where a leaf needs it, it holds a relay reservation with its
active gateway.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from hypha.backoff import Backoff
from hypha.errors import NetworkError
from hypha.net.libp2p.relay import RelayClient
from hypha.net.options import Timings
from hypha.net.peers.addresses import Address, AddressBook
from hypha.net.peers.dialing import Dialer
from hypha.net.peers.table import PeerTable
from hypha.node import Changes
from hypha.waiting import Reminder

logger = logging.getLogger(__name__)

#: A connection that held this long was a good one: the pause starts small again.
STABLE_S = 10.0
#: A relay reservation is refreshed at least this often.
REFRESH_S = 300.0


class Gateways:
    """Keeps a node in touch with its gateways. ``joined`` is awaited after each new connection."""

    joined: Callable[[str], Awaitable[None]]

    def __init__(
        self,
        addresses: tuple[str, ...],
        book: AddressBook,
        dialer: Dialer,
        peers: PeerTable,
        relay: RelayClient,
        timings: Timings,
    ) -> None:
        # gateways at the same PeerID (several addresses) are one
        self._targets: list[tuple[Address, ...]] = []
        by_peer: dict[str, list[Address]] = {}
        for text in addresses:
            address = book.configure(text)
            if address.peer is None:
                self._targets.append((address,))
            else:
                by_peer.setdefault(address.peer, []).append(address)
        self._targets += [tuple(group) for group in by_peer.values()]
        self._book = book
        self._dialer = dialer
        self._peers = peers
        self._relay = relay
        self._timings = timings
        self.known: dict[str, tuple[Address, ...]] = {peer: tuple(group) for peer, group in by_peer.items()}
        self.active: str | None = None
        self.reserved: str | None = None
        self.changed = Changes()
        #: the node is about to end: who is lost now stays lost, and is no news
        self.leaving = False

    def connected(self) -> list[str]:
        """PeerIDs of the gateways that are connected, the active one first."""
        found = [peer for peer in self.known if self._peers.is_connected(peer) and self.is_one(peer)]
        return sorted(found, key=lambda peer: peer != self.active)

    def linked(self) -> list[str]:
        """Connected gateways, also those that have dialled and are not configured: by their certificates."""
        return list(dict.fromkeys((*self.connected(), *self._peers.carrying("gateway"))))

    def is_one(self, peer: str) -> bool:
        """Whether the certificate of a peer that is or was connected makes it a gateway."""
        return self._peers.may_serve_as("gateway", peer)

    def circuit_addresses(self, own_peer: str) -> list[str]:
        """Where this node may be reached through its active gateway, if it holds a reservation."""
        if self.reserved is None:
            return []
        return [
            str(Address(one.transport, own_peer, relay=self.reserved))
            for one in self.known.get(self.reserved, ())
        ]

    async def wait_connected(self) -> None:
        """Return when a gateway is connected, at once when none is configured."""
        seen = self.changed.count
        while self._targets and not self.connected():
            seen = await self.changed.wait(seen)

    async def _reach(self, target: tuple[Address, ...]) -> str:
        peer = target[0].peer
        if peer is None:
            peer = await self._dialer.who_is_at(target[0])
            address = Address(target[0].transport, peer)
            self._book.configure(str(address))
            self.known[peer] = (address, *(one for one in self.known.get(peer, ()) if one != address))
        await self._dialer.connect(peer, relays=False)
        # whoever answers at the address may be anybody with a certificate
        self._peers.require_service("gateway", peer)
        return peer

    async def use_one(self, reserve: bool) -> None:
        """The leaf's loop: one active gateway, the next at once when it is lost."""
        if not self._targets:
            return
        backoff = Backoff(self._timings.reconnect_min_s, self._timings.reconnect_max_s)
        turn, reminder = 0, Reminder(at_once=True)
        while True:
            failures = []
            for _ in range(len(self._targets)):
                target = self._targets[turn % len(self._targets)]
                try:
                    peer = await self._reach(target)
                except NetworkError as exc:
                    failures.append(str(exc))
                    turn += 1
                    continue
                since = trio.current_time()
                await self._use(peer, reserve)
                turn += 1  # it was lost: another one first
                if trio.current_time() - since >= STABLE_S:
                    backoff.reset()
                    failures.clear()
                reminder.reset()
                break
            if len(failures) == len(self._targets) and reminder.due():
                logger.warning("No gateway can be reached; trying on. %s", "; ".join(failures))
            if failures or len(self._targets) == 1:
                await trio.sleep(backoff.next_s())

    async def _use(self, peer: str, reserve: bool) -> None:
        self.active = peer
        before = self._peers.connections_of(peer)
        logger.info("Connected to gateway %s.", peer, extra={"peer_id": peer})
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.joined, peer)
                if reserve:
                    nursery.start_soon(self._hold_reservation, peer)
                self.changed.note()
                await self._peers.wait_lost(peer, before)
                nursery.cancel_scope.cancel()
        finally:
            self.active = None
            self.reserved = None
        if self.leaving:
            await trio.sleep_forever()
        logger.warning("Lost gateway %s; moving on to the next.", peer, extra={"peer_id": peer})
        self.changed.note()

    async def _hold_reservation(self, peer: str) -> None:
        backoff = Backoff(self._timings.reconnect_min_s, self._timings.reconnect_max_s)
        reminder = Reminder(at_once=True)
        while True:
            try:
                lasts_s = await self._relay.reserve(peer)
            except NetworkError as exc:
                if self.reserved is not None:
                    reminder.reset()
                    self.reserved = None
                if reminder.due():
                    logger.warning(
                        "No relay reservation, so only those who can dial this node reach it: %s.",
                        exc,
                        extra={"peer_id": peer},
                    )
                await trio.sleep(backoff.next_s())
                continue
            backoff.reset()
            logger.debug("Reserved at the relay for %.0f s.", lasts_s, extra={"peer_id": peer})
            if self.reserved is None:
                self.reserved = peer
                self.changed.note()
            await trio.sleep(min(lasts_s / 2, REFRESH_S))

    async def link_all(self) -> None:
        """The gateway's loop: a link to each of the others."""
        async with trio.open_nursery() as nursery:
            for target in self._targets:
                nursery.start_soon(self._link, target)

    async def _link(self, target: tuple[Address, ...]) -> None:
        if target[0].peer == self._book.own_peer:
            # one list of gateways for all of them is convenient
            logger.info(
                "%s has the PeerID of this gateway: it is this one, or another that uses its certificate, "
                "which none may.",
                target[0],
            )
            return
        backoff = Backoff(self._timings.reconnect_min_s, self._timings.reconnect_max_s)
        reminder = Reminder(at_once=True)
        while True:
            try:
                peer = await self._reach(target)
            except NetworkError as exc:
                if reminder.due():
                    logger.warning("Another gateway cannot be reached; trying on. %s", exc)
                await trio.sleep(backoff.next_s())
                continue
            reminder.reset()
            backoff.reset()
            before = self._peers.connections_of(peer)
            logger.info("Linked with gateway %s.", peer, extra={"peer_id": peer})
            await self.joined(peer)
            self.changed.note()
            await self._peers.wait_lost(peer, before)
            if self.leaving:
                await trio.sleep_forever()
            logger.warning("Lost the link with gateway %s.", peer, extra={"peer_id": peer})
            self.changed.note()
