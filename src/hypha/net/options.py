"""What a node can be told, and how it is read from a component's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypha.config.models import GatewayConfig, LeafConfig, NodeConfig
from hypha.config.tuning import LimitsConfig, LivenessTuning, TuningConfig
from hypha.pki.identity import Identity, IdentityFiles, load_identity


class Timings(LivenessTuning):
    """Seconds; with those that only tests shorten."""

    #: how often certificate, trust and revocation files are looked at
    identity_poll_s: float = 5.0
    #: how often a gateway asks the others about all nodes that it is connected with
    doubles_check_s: float = 60.0


@dataclass(frozen=True)
class RelayLimits:
    """What a gateway gives away; ``per_peer`` bounds circuits to one peer, ``per_caller`` those of one."""

    reservations: int = 1024
    circuits: int = 256
    per_peer: int = 64
    reservation_s: float = 3600.0

    @property
    def per_caller(self) -> int:
        """Half of all: a scheduler needs one to each of its workers, and nobody may keep the others out."""
        return max(1, self.circuits // 2)


@dataclass(frozen=True)
class NodeOptions:
    """Everything :func:`hypha.net.open_node` needs.

    ``gateways`` are multiaddrs, with or without ``/p2p/<PeerID>`` (without: whichever certified node
    answers there). ``hop`` makes the node a gateway: relay, DHT server, linked with all ``gateways``.
    ``exclude_cidr``: addresses that are neither dialled nor learnt nor announced; configured gateways and
    ``external`` addresses are exempt. ``guest``: it only looks on, beside a node that may have the same
    certificate.
    """

    identity: Identity
    component: str
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    external: tuple[str, ...] = ()
    gateways: tuple[str, ...] = ()
    hop: bool = False
    guest: bool = False
    reserve: bool = True
    exclude_cidr: tuple[str, ...] = ()
    require_roles: bool = False
    max_connections: int = 1024
    relay_limits: RelayLimits = field(default_factory=RelayLimits)
    timings: Timings = field(default_factory=Timings)
    #: of the line
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    #: but for what is in ``timings`` and ``relay_limits``
    tuning: TuningConfig = field(default_factory=TuningConfig)


def options_from(config: NodeConfig, component: str, identity: Identity | None = None) -> NodeOptions:
    """The options of ``component`` as ``config`` says. Loads the identity unless it is given.

    Raises IdentityError.
    """
    if identity is None:
        identity = load_identity(
            IdentityFiles(config.cert_pem, config.key_pem, config.trust_pem, config.crls_pem)
        )
    gateways: tuple[str, ...] = ()
    limits = RelayLimits()
    if isinstance(config, (LeafConfig, GatewayConfig)):
        gateways = tuple(config.gateway_addresses)
    if isinstance(config, GatewayConfig):
        limits = RelayLimits(
            reservations=config.max_reservations,
            circuits=config.max_circuits,
            per_peer=config.tuning.connections.circuits_per_peer,
        )
    return NodeOptions(
        identity=identity,
        component=component,
        listen=tuple(config.listen_addresses),
        external=tuple(config.external_addresses),
        gateways=gateways,
        hop=isinstance(config, GatewayConfig),
        reserve=isinstance(config, LeafConfig) and config.relay_circuit,
        exclude_cidr=tuple(config.exclude_cidr),
        require_roles=config.require_roles,
        max_connections=config.max_connections,
        relay_limits=limits,
        timings=Timings(**dict(config.tuning.liveness)),
        limits=config.limits,
        tuning=config.tuning,
    )
