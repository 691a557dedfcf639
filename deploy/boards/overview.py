"""Is everything well?"""

from __future__ import annotations

from deploy.boards.panels import WANTED, Board, Panel, part, quantile, rate

OVERVIEW = Board(
    "overview",
    "Hypha: overview",
    "Is everything well? Alerts first, then jobs, then nodes.",
    (
        (
            "Now",
            (
                Panel("Alerts", "short", 'count(ALERTS{alertstate="firing"}) or vector(0)', number=True),
                Panel("Gateways up", "short", 'sum(up{job="hypha-gateway"})', number=True),
                Panel("Workers leased", "short", "sum(hypha_active_workers)", number=True),
                Panel("Samples that count", "short", "sum(hypha_job_goodput)", note="A second.", number=True),
                Panel("Longest since a round", "s", "max(hypha_job_round_age)", number=True),
                Panel("Soonest expiry", "s", "min(hypha_certificate_expires)", number=True),
            ),
        ),
        (
            "Jobs",
            (
                Panel(
                    "Workers leased",
                    "short",
                    "hypha_active_workers * on (job, instance) group_left (hypha_job) target_info",
                    "{{hypha_job}}",
                ),
                Panel("Training throughput", "short", rate("hypha_training_samples_total"), "samples/s"),
                Panel(
                    "Where workers' time goes",
                    "percentunit",
                    f"{WANTED} - {rate('hypha_job_badput_seconds_total')}",
                    "training",
                    note="Worker seconds a second. Of the training some may still be lost.",
                    stacked=True,
                    more=((rate("hypha_job_badput_seconds_total", "reason"), "{{reason}}"),),
                ),
                Panel(
                    "Renewals that succeed",
                    "percentunit",
                    part("hypha_lease_renewals_total", 'status="success"'),
                ),
                Panel(
                    "Data fetch latency",
                    "s",
                    quantile(0.95, "hypha_data_fetch_duration"),
                    "p95",
                    more=((quantile(0.5, "hypha_data_fetch_duration"), "p50"),),
                ),
                Panel(
                    "Short of leases",
                    "s",
                    "hypha_scheduler_waiting > 0",
                    "{{instance}} {{kind}}",
                    note="How long a job has waited for workers.",
                ),
            ),
        ),
        (
            "Nodes",
            (
                Panel("Nodes up", "short", 'sum by (job) (up{job=~"hypha-.*"})', "{{job}}"),
                Panel(
                    "Bandwidth",
                    "Bps",
                    rate("hypha_network_bytes_sent_total"),
                    "sent",
                    more=((rate("hypha_network_bytes_received_total"), "received"),),
                ),
                Panel(
                    "Errors and warnings",
                    "short",
                    rate('hypha_log_entries_total{level=~"error|warn"}', "job, level"),
                    "{{job}} {{level}}",
                    note="Log entries a second.",
                ),
            ),
        ),
    ),
)
