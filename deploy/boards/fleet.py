"""What do the machines do?"""

from __future__ import annotations

from deploy.boards.panels import Board, Panel, part, quantile, rate

FLEET = Board(
    "fleet",
    "Hypha: fleet",
    "What do the machines do: workers, data nodes, disks, certificates, clocks.",
    (
        (
            "Workers",
            (
                Panel("CPU", "percentunit", "hypha_worker_cpu_utilization", "{{instance}}"),
                Panel("Memory", "bytes", "hypha_worker_memory_used", "{{instance}}"),
                Panel("GPU", "percentunit", "hypha_worker_gpu_utilization", "{{instance}} {{gpu}}"),
                Panel(
                    "Executors",
                    "short",
                    "sum by (instance, kind) (hypha_worker_jobs)",
                    "{{instance}} {{kind}}",
                ),
                Panel(
                    "Samples",
                    "short",
                    rate("hypha_training_samples_total", "instance"),
                    "{{instance}}",
                    note="A second.",
                ),
                Panel(
                    "Requests for workers",
                    "short",
                    rate("hypha_worker_offers_total", "outcome"),
                    "{{outcome}}",
                    note="A second, by what came of them.",
                ),
                Panel(
                    "Executors started",
                    "short",
                    rate("hypha_executor_starts_total", "kind, way"),
                    "{{kind}} {{way}}",
                    note="A second.",
                ),
                Panel(
                    "Loading, p95", "s", quantile(0.95, "hypha_executor_loading_duration", "kind"), "{{kind}}"
                ),
                Panel(
                    "Sending updates, p95",
                    "s",
                    quantile(0.95, "hypha_update_send_duration", "instance"),
                    "{{instance}}",
                ),
            ),
        ),
        (
            "Slices",
            (
                Panel(
                    "Fetching, p95",
                    "s",
                    quantile(0.95, "hypha_data_fetch_duration", "instance"),
                    "{{instance}}",
                ),
                Panel(
                    "Found in the cache",
                    "percentunit",
                    part("hypha_data_cache_lookups_total", 'result="hit"', "instance"),
                    "{{instance}}",
                ),
                Panel(
                    "Served",
                    "Bps",
                    rate("hypha_data_served_bytes_total", "instance, dataset"),
                    "{{instance}} {{dataset}}",
                ),
                Panel(
                    "Requests",
                    "short",
                    rate("hypha_data_slice_requests_total", "dataset, status"),
                    "{{dataset}} {{status}}",
                    note="A second.",
                ),
                Panel("Streams", "short", "hypha_data_streams_active", "{{instance}}"),
                Panel(
                    "Serving, p95", "s", quantile(0.95, "hypha_data_serve_duration", "dataset"), "{{dataset}}"
                ),
            ),
        ),
        (
            "Machines",
            (
                Panel("Free on disk", "bytes", "hypha_disk_free", "{{instance}} {{place}}"),
                Panel(
                    "Until expiry",
                    "s",
                    "min by (job, instance, file) (hypha_certificate_expires)",
                    "{{instance}} {{file}}",
                    signed=True,
                ),
                Panel(
                    "Clocks",
                    "s",
                    "hypha_clock_unix - timestamp(hypha_clock_unix)",
                    "{{instance}}",
                    note="Ahead of Prometheus; of nodes that send, behind by the interval at which they do.",
                    signed=True,
                ),
                Panel("Up for", "s", "hypha_uptime", "{{job}} {{instance}}"),
                Panel("Memory of processes", "bytes", "process_memory_usage", "{{job}} {{instance}}"),
                Panel(
                    "Telemetry not delivered",
                    "short",
                    rate("hypha_telemetry_export_failures_total", "job, signal"),
                    "{{job}} {{signal}}",
                    note="Batches a second.",
                ),
            ),
        ),
    ),
)
