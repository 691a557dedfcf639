"""How do nodes reach each other?"""

from __future__ import annotations

from deploy.boards.panels import Board, Panel, quantile, rate

NETWORK = Board(
    "network",
    "Hypha: network",
    "How do nodes reach each other: connections, bytes, look-ups, requests and relays.",
    (
        (
            "Connections",
            (
                Panel(
                    "Connections", "short", "sum by (job, way) (hypha_network_connections)", "{{job}} {{way}}"
                ),
                Panel(
                    "Connections that failed",
                    "short",
                    rate("hypha_network_connections_failed_total", "job, reason"),
                    "{{job}} {{reason}}",
                    note="A second.",
                ),
                Panel(
                    "Connections that ended",
                    "short",
                    rate("hypha_network_connections_lost_total", "job, reason"),
                    "{{job}} {{reason}}",
                    note="A second.",
                ),
                Panel(
                    "Longest round trips",
                    "s",
                    "topk(5, hypha_network_round_trip)",
                    "{{instance}} to {{peer}}",
                ),
                Panel(
                    "Sent", "Bps", rate("hypha_network_bytes_sent_total", "job, plane"), "{{job}} {{plane}}"
                ),
                Panel(
                    "Received",
                    "Bps",
                    rate("hypha_network_bytes_received_total", "job, plane"),
                    "{{job}} {{plane}}",
                ),
            ),
        ),
        (
            "Messages",
            (
                Panel("Requests, p95", "s", quantile(0.95, "hypha_rpc_client_duration", "type"), "{{type}}"),
                Panel(
                    "Requests that were not answered well",
                    "short",
                    rate('hypha_rpc_client_duration_count{status!="success"}', "type, status"),
                    "{{type}} {{status}}",
                    note="A second.",
                ),
                Panel(
                    "Gossip",
                    "short",
                    rate("hypha_gossip_messages_total", "event"),
                    "{{event}}",
                    note="A second.",
                ),
                Panel("Gossip mesh", "short", "min by (job) (hypha_gossip_mesh_peers)", "{{job}}, least"),
                Panel(
                    "DHT queries",
                    "short",
                    rate("hypha_dht_queries_total", "side, operation, status"),
                    "{{side}} {{operation}} {{status}}",
                    note="A second.",
                ),
                Panel(
                    "DHT queries, p95",
                    "s",
                    quantile(0.95, "hypha_dht_query_duration", "operation"),
                    "{{operation}}",
                ),
            ),
        ),
        (
            "Files and relays",
            (
                Panel(
                    "Files",
                    "Bps",
                    rate("hypha_transfer_bytes_total", "kind, direction"),
                    "{{kind}} {{direction}}",
                ),
                Panel("Transfers, p95", "s", quantile(0.95, "hypha_transfer_duration", "kind"), "{{kind}}"),
                Panel(
                    "Transfers that failed",
                    "short",
                    rate('hypha_transfer_duration_count{status="failure"}', "kind"),
                    "{{kind}}",
                    note="A second.",
                ),
                Panel(
                    "Relay",
                    "short",
                    "hypha_relay_circuits",
                    "circuits at {{instance}}",
                    more=(("hypha_relay_reservations", "reservations at {{instance}}"),),
                ),
                Panel("Relayed", "Bps", rate("hypha_relay_bytes_total", "instance"), "{{instance}}"),
                Panel(
                    "Circuits asked for",
                    "short",
                    rate("hypha_relay_circuits_opened_total", "status"),
                    "{{status}}",
                    note="A second.",
                ),
            ),
        ),
    ),
)
