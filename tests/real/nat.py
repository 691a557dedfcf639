"""A node behind a router that translates addresses and lets nobody in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from tests.support.namespaces import Lab
from tests.support.system import System

from hypha.cli.local.children import Child

GATEWAY = "10.77.0.1"
PUBLIC = "10.77.0.10"
INSIDE = "10.77.1.2"

# The last two rules have what the policy would do anyway, to count it.
ROUTER = """
table inet hypha {{
    counter refused_in {{ }}
    counter refused_out {{ }}
    chain forward {{
        type filter hook forward priority 0; policy drop;
        ct state established,related accept
        iifname "to-inside" {allowed} accept
        iifname "to-inside" counter name refused_out drop
        counter name refused_in drop
    }}
}}
table ip hypha {{
    chain postrouting {{
        type nat hook postrouting priority 100;
        oifname "to-public" masquerade
    }}
}}
"""


@dataclass(frozen=True)
class Nat:
    """Namespaces: ``public`` for everybody else, ``router``, and ``inside`` for the node behind it."""

    public: str
    router: str
    inside: str


def behind_nat(lab: Lab, gateway_only: bool) -> Nat:
    """Inbound connections are dropped without a word, as most routers do; outbound ones too when
    ``gateway_only``, unless they lead to the gateway.
    """
    nat = Nat(lab.add("public"), lab.add("router"), lab.add("inside"))
    lab.cable(nat.public, f"{GATEWAY}/24", nat.router, "10.77.0.2/24")
    lab.address(nat.public, nat.router, f"{PUBLIC}/24")
    lab.cable(nat.router, "10.77.1.1/24", nat.inside, f"{INSIDE}/24")
    lab.route(nat.inside, "default", "10.77.1.1")
    # whoever dials the inner address gets as far as the router, and waits
    lab.route(nat.public, "10.77.1.0/24", "10.77.0.2")
    lab.forwards(nat.router)
    allowed = f"ip daddr {GATEWAY}" if gateway_only else ""
    lab.rules(nat.router, ROUTER.format(allowed=allowed))
    return nat


@dataclass(frozen=True)
class Sent:
    """A file that a node says it has sent; ``way`` is direct, dial-back or stream."""

    name: str
    to: str
    way: str


def sent_by(child: Child) -> Iterator[Sent]:
    """What its log says it has sent."""
    for line in child.log.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        message = entry.get("message", "")
        if message.startswith("Sent ") and message.endswith(")."):
            name = message.removeprefix("Sent ").partition(",")[0]
            yield Sent(name, entry["peer_id"], message.rpartition("(")[2].removesuffix(")."))


@dataclass
class Place:
    """Puts nodes of a system at their places in the network."""

    system: System
    nat: Nat

    def public(self, *names: str, host: str = PUBLIC) -> dict[str, list[str]]:
        """``names`` run in the open; what their configuration needs for it."""
        return self._put(self.nat.public, host, names)

    def inside(self, *names: str) -> dict[str, list[str]]:
        """``names`` run behind the router."""
        return self._put(self.nat.inside, INSIDE, names)

    async def gateway(self) -> Child:
        """Start the gateway."""
        self.public("gateway")
        return await self.system.gateway(planned=self.system.plan_gateway(host=GATEWAY))

    def _put(self, place: str, host: str, names: tuple[str, ...]) -> dict[str, list[str]]:
        self.system.places.update(dict.fromkeys(names, place))
        return {"listen_addresses": [f"/ip4/{host}/tcp/0"]}
