"""How is this job: does it learn, how fast, what does it wait for and why?"""

from __future__ import annotations

from deploy.boards.panels import OF_JOB, RATE, WANTED_OF_JOB, Board, Panel, one_job, quantile, rate

JOB = Board(
    "job",
    "Hypha: job",
    "How is this job: does it learn, how fast, what does it wait for and why?",
    (
        (
            "Now",
            (
                Panel("Rounds", "short", one_job("hypha_job_round"), number=True),
                Panel("of", "short", one_job("hypha_job_rounds"), number=True),
                Panel("Loss", "short", one_job("hypha_job_loss"), number=True),
                Panel(
                    "Samples that count", "short", one_job("hypha_job_goodput"), note="A second.", number=True
                ),
                Panel("Since the last round", "s", one_job("hypha_job_round_age"), number=True),
                Panel("Since the last checkpoint", "s", one_job("hypha_checkpoint_age"), number=True),
            ),
        ),
        (
            "Learning",
            (
                Panel(
                    "Loss",
                    "short",
                    one_job("hypha_job_loss"),
                    "mean",
                    more=((one_job("hypha_worker_loss"), "{{worker}}"),),
                ),
                Panel("Norm of updates", "short", one_job("hypha_worker_update_norm"), "{{worker}}"),
                Panel(
                    "Cosine of updates to their mean",
                    "short",
                    one_job("hypha_worker_update_cosine"),
                    "{{worker}}",
                    signed=True,
                ),
            ),
        ),
        (
            "Speed",
            (
                Panel(
                    "Samples in applied updates",
                    "short",
                    rate("hypha_job_samples_total", of_job=True),
                    "samples/s",
                ),
                Panel(
                    "Where workers' time goes",
                    "percentunit",
                    f"{WANTED_OF_JOB} - {rate('hypha_job_badput_seconds_total', of_job=True)}",
                    "training",
                    note="Worker seconds a second; of the training some may still be lost.",
                    stacked=True,
                    more=((rate("hypha_job_badput_seconds_total", "reason", True), "{{reason}}"),),
                ),
                Panel(
                    "Duration of rounds",
                    "s",
                    quantile(0.5, "hypha_job_round_duration", of_job=True),
                    "p50",
                    more=((quantile(0.95, "hypha_job_round_duration", of_job=True), "p95"),),
                ),
                Panel("Time of a batch", "s", one_job("hypha_worker_batch_time"), "{{worker}}"),
                Panel(
                    "Idle",
                    "percentunit",
                    one_job("hypha_worker_idle_ratio"),
                    "{{worker}}",
                    note="Of a worker's rounds, from its last batch to the first of the next round.",
                ),
                Panel("Bytes of the last round", "bytes", one_job("hypha_job_round_bytes"), "{{kind}}"),
                Panel("State", "short", one_job("hypha_job_state == 1"), "{{state}}"),
            ),
        ),
        (
            "Workers and data",
            (
                Panel(
                    "Leases",
                    "short",
                    one_job("hypha_scheduler_leases"),
                    "{{kind}}",
                    more=((one_job("hypha_scheduler_leases_wanted"), "{{kind}} wanted"),),
                ),
                Panel(
                    "Offers",
                    "short",
                    rate("hypha_scheduler_offers_total", "kind, outcome", True),
                    "{{kind}} {{outcome}}",
                    note="A second, by what became of them: why a job waits.",
                ),
                Panel(
                    "Failures",
                    "short",
                    f"sum by (kind, reason) (increase(hypha_job_failures_total{RATE}) {OF_JOB})",
                    "{{kind}} {{reason}}",
                ),
                Panel(
                    "Recovery",
                    "s",
                    quantile(0.5, "hypha_job_recovery_duration", "phase", True),
                    "{{phase}}",
                    note="The median after a failure: noticed, replaced, caught up.",
                ),
                Panel("Slices", "short", one_job("hypha_data_slices"), "{{state}}", stacked=True),
                Panel("Data nodes", "short", one_job("hypha_data_providers")),
            ),
        ),
    ),
    of_job=True,
)
