"""The bridge's OpenAPI description, made from the very types that the bridge decodes and encodes."""

from __future__ import annotations

import msgspec

from hypha import __version__
from hypha.messages import (
    BridgeError,
    Directive,
    FetchCall,
    FetchedFile,
    Job,
    ReceiveCall,
    ReceivedFile,
    SendCall,
    Sent,
    SpansCall,
    StatusCall,
)

_REF = "#/components/schemas/{name}"

_DESCRIPTION = """HTTP/1.1 with JSON over a Unix socket. Event streams (text/event-stream) start with a
comment line, carry one JSON document in each `data` field and a comment every few seconds; opened again
after a break they repeat what still matters. Paths are relative to the job directory and cannot leave it.
A client that closes its connection, or the sending side of it, has withdrawn its request.

An executor shows that it does not hang by sending events. While it has nothing to do (it waits for theta, a
plan, data or updates) it may send `alive`, about once a second and from the thread that works otherwise. From
its first `alive` on, and from its start where the worker's owner gave it a `hang_s`, the worker kills it when
it sends nothing for `hang_s` seconds (the worker's, 600 unless set; or the job's, when that is less; before
`loaded` or `model-ready` never less than 300). An executor that never sends `alive` is not watched at all.

Where the job has `traced`, a call may have a W3C `traceparent` header: what the worker does for it is then
part of that trace."""


def openapi() -> dict[str, object]:
    calls = [FetchCall, SendCall, ReceiveCall, StatusCall, SpansCall]
    types = [*calls, Job, FetchedFile, Sent, ReceivedFile, Directive, BridgeError]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    by_type = dict(zip(types, schemas, strict=True))

    def content(kind: str, schema: object) -> dict[str, object]:
        return {"content": {kind: {"schema": schema}}}

    def operation(
        summary: str, answer: dict[str, object], errors: dict[str, str], call: object = None
    ) -> dict[str, object]:
        failures = {
            status: {"description": meaning, **content("application/json", by_type[BridgeError])}
            for status, meaning in errors.items()
        }
        found: dict[str, object] = {"summary": summary, "responses": {"200": answer, **failures}}
        if call is None:
            return {"get": found}
        found["requestBody"] = {"required": True, **content("application/json", by_type[call])}
        return {"post": found}

    def answer(description: str, schema: object, kind: str = "application/json") -> dict[str, object]:
        return {"description": description, **content(kind, schema)}

    stream = "text/event-stream"
    bad = {
        "400": "the call is wrong",
        "413": "the call is too large",
        "500": "an error of the worker",
        "503": "too much at once (`busy`): the same call may succeed later",
    }
    files = {"403": "an allow-list forbids it", "404": "it does not exist"}
    done: dict[str, object] = {"description": "taken charge of"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Hypha executor bridge", "version": __version__, "description": _DESCRIPTION},
        "paths": {
            "/job": operation("What is to be done", answer("the job", by_type[Job]), {}),
            "/resources/fetch": operation(
                "Bring files into the job directory; for dataset slices, wait for the next one",
                answer("the files", {"type": "array", "items": by_type[FetchedFile]}),
                {**bad, **files, "409": "a peer refused", "502": "nobody could be reached"},
                FetchCall,
            ),
            "/resources/send": operation(
                "Send a file of the job directory; answered when it is decided for every receiver",
                answer("at least one receiver has acknowledged", by_type[Sent]),
                {
                    **bad,
                    **files,
                    "409": "nobody acknowledged, and one refused: `error` is its code",
                    "502": "nobody could be reached",
                },
                SendCall,
            ),
            "/resources/receive": operation(
                "Files that peers send to this job, as they arrive whole",
                answer("events", by_type[ReceivedFile], stream),
                bad,
                ReceiveCall,
            ),
            "/directives": operation(
                "What the scheduler wants: the newest of each kind, then as they come",
                answer("events", by_type[Directive], stream),
                {},
            ),
            "/status/send": operation("Send an event to the scheduler", done, bad, StatusCall),
            "/spans": operation(
                "Spans to export, where the job is traced; one that is refused is not to be repeated",
                done,
                {**bad, "409": "this worker exports no traces (`unsupported`)"},
                SpansCall,
            ),
        },
        "components": {"schemas": components},
    }
