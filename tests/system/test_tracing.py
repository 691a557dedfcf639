"""One job over real processes, every span of it received: who did what, and at whose request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.support.otlp import Received, attributes, http_receiver
from tests.support.system import System, digits_dataset, digits_job

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

ROUNDS = 3

Span = dict[str, Any]


class Walk:
    """The spans of a run, by identifier."""

    def __init__(self, received: Received) -> None:
        self.spans = {one["spanId"]: one for one in received.spans()}

    def named(self, name: str, service: str | None = None, **with_attributes: Any) -> list[Span]:
        return [
            one
            for one in self.spans.values()
            if one["name"] == name
            and service in (None, one["resource"]["service.name"])
            and with_attributes.items() <= {k: str(v) for k, v in attributes(one).items()}.items()
        ]

    def ancestors(self, span: Span) -> list[tuple[str, str]]:
        """(service, operation) from the span up to the root of its trace; all of them were received."""
        found = []
        while parent := span.get("parentSpanId"):
            assert parent in self.spans, f"{span['name']} has a parent that nobody sent: {found}"
            above = self.spans[parent]
            assert above["traceId"] == span["traceId"]
            found.append((above["resource"]["service.name"], above["name"]))
            span = above
        return found


def services(spans: list[Span]) -> set[str]:
    return {one["resource"]["service.name"] for one in spans}


async def test_one_trace_through_every_component(system: System, tmp_path: Path) -> None:
    with http_receiver() as (endpoint, received):
        keys = {"telemetry_endpoint": endpoint, "telemetry_sampler": "parentbased_always_on"}
        gateway = system.plan_gateway()
        await system.start("gateway", "gateway", system.write("gateway", "gateway", **gateway, **keys))
        await system.data("data", digits_dataset(tmp_path), **keys)
        for number in range(2):
            await system.worker(f"worker-{number}", **keys)
        job = digits_job(None, 2, ROUNDS)
        scheduler = await system.scheduler(job, **keys)
        assert await system.ended(scheduler) == 0, scheduler.tail()
        # what waits is sent as each node ends
        await system.group.stop()
    walk = Walk(received)

    # the specification's example, from the request for workers to the accepted offer
    accepted = walk.named("Accept offer", "hypha-scheduler")
    assert accepted
    for span in accepted:
        names = [name for _, name in walk.ancestors(span)]
        wanted = [
            "Receive offer",
            "Send offer",
            "Evaluate request",
            "Receive advertisement",
            "Relay message",
            "Gossipsub publish",
            "Publish task advertisement",
        ]
        assert [name for name in names if name in wanted] == wanted
        assert ("hypha-gateway", "Relay message") in walk.ancestors(span)
        assert ("hypha-worker", "Send offer") in walk.ancestors(span)

    # one trace holds them all
    [trace] = {one["traceId"] for one in accepted}
    whole = [one for one in walk.spans.values() if one["traceId"] == trace]
    assert services(whole) >= {
        "hypha-scheduler",
        "hypha-gateway",
        "hypha-worker",
        "hypha-executor",
        "hypha-data",
    }
    for span in walk.named("Load model", "hypha-executor"):
        above = walk.ancestors(span)
        assert [one for one in above if one[1] in ("Execute job", "Dispatch job")] == [
            ("hypha-worker", "Execute job"),
            ("hypha-scheduler", "Dispatch job"),
        ]
    kinds = {attributes(one).get("hypha.executor.class") for one in walk.named("Execute job", "hypha-worker")}
    assert kinds == {"train", "aggregate"}

    # each round is one trace, in which all take part
    rounds = walk.named("Round", "hypha-scheduler")
    assert len(rounds) == ROUNDS
    for span in rounds:
        assert not span.get("parentSpanId")
        assert len(span["links"]) >= 1, "a round is linked to the dispatches"
        inside = [one for one in walk.spans.values() if one["traceId"] == span["traceId"]]
        by_name = {
            name: [one for one in inside if one["name"] == name] for name in {one["name"] for one in inside}
        }
        assert len(by_name["Train"]) == 2
        assert len(by_name["Outer step"]) == 1
        assert len(by_name["Send update"]) == 2
        assert len(by_name["Receive update"]) == 2
        assert by_name["Plan"]
        for name in ("Train", "Outer step", "Send update"):
            for one in by_name[name]:
                assert one["resource"]["service.name"] == "hypha-executor"
                assert ("hypha-scheduler", "Round") in walk.ancestors(one)
    served = walk.named("Serve slice", "hypha-data")
    assert served
    for span in served:
        assert ("hypha-worker", "Fetch slice") in walk.ancestors(span)
    for span in walk.named("Receive file"):
        assert walk.ancestors(span)[0][1] in ("Send file", "Answer", "Request")

    # no span is left hanging in the air, whoever made it
    for span in walk.spans.values():
        walk.ancestors(span)
