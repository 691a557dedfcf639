"""Examples of every message, made from their types: one with all its fields, none as by default, and one with
the least that a sender must say. And what a recorded value must be equal to when today's code reads it.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import Struct, inspect

from hypha import messages
from hypha.config.tasks import TASKS
from hypha.messages import (
    BridgeError,
    DispatchJob,
    ExecutorDescriptor,
    FetchCall,
    FetchedFile,
    ForkReply,
    ForkRequest,
    GossipEnvelope,
    JobStamp,
    LedgerFile,
    PeerRef,
    ReceiveCall,
    ReceivedFile,
    Report,
    ReportEvent,
    RequestEnvelope,
    ResponseEnvelope,
    SendCall,
    Sent,
    SpansCall,
    StatusCall,
    Steer,
    TrainJob,
)
from hypha.net.bulk import wire as bulk_wire
from hypha.scheduler.status.round_record import Now, Past
from hypha.scheduler.status.snapshot import JobSnapshot

#: A valid PeerID: some code looks into them.
PEER = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
#: Numbers that say how the rest is to be read, so they stay as they are.
_FIXED = frozenset({"v", "version"})
_LETTERS = 26


@dataclass(frozen=True)
class Kind:
    """A message as it travels: what is encoded has the type ``carrier``, and ``encoding`` tells how.
    ``example(least)`` makes one.
    """

    name: str
    carrier: Any
    encoding: str
    example: Callable[[bool], Any]

    def encode(self, value: Any) -> bytes:
        """The bytes that a peer or an executor gets."""
        if self.encoding == "frame":
            return bulk_wire.encode_frame(value)
        return (msgspec.json if self.encoding == "json" else msgspec.msgpack).encode(value)

    def decode(self, data: bytes) -> Any:
        """What today's code reads."""
        if self.encoding == "frame":
            head, payload = data[: bulk_wire.LENGTH_BYTES], data[bulk_wire.LENGTH_BYTES :]
            assert bulk_wire.decode_length(head, bulk_wire.MAX_FRAME_BYTES) == len(payload)
            return bulk_wire.decode_frame(payload)
        return (msgspec.json if self.encoding == "json" else msgspec.msgpack).decode(data, type=self.carrier)


def kinds() -> Iterator[Kind]:
    """Every kind of message there is now, each in the envelope in which it travels."""
    stamp = JobStamp(job_id="job", generation=1, round=2, attempt=3)
    for one in members(messages.Request):
        yield _inside("request", RequestEnvelope, one, lambda body: RequestEnvelope(body=body))
    for one in members(messages.Response):
        yield _inside("response", ResponseEnvelope, one, lambda body: ResponseEnvelope(body=body))
    for one in members(messages.Job):
        yield _inside(
            "job", RequestEnvelope, one, lambda job: RequestEnvelope(body=DispatchJob(lease_id="l", job=job))
        )
    for one in members(messages.Directive):
        yield _inside(
            "directive",
            RequestEnvelope,
            one,
            lambda said: RequestEnvelope(body=Steer(stamp=stamp, kind="train", seq=4, directive=said)),
        )
    for one in members(messages.Event):
        yield _inside(
            "event",
            RequestEnvelope,
            one,
            lambda event: RequestEnvelope(
                body=ReportEvent(stamp=stamp, kind="train", incarnation="i", seq=5, event=event)
            ),
        )
        yield _inside("bridge-event", StatusCall, one, lambda event: StatusCall(event=event), "json")
    for one in members(messages.Directive):
        yield _alone("bridge-directive", one, "json", messages.Directive)
    for one in members(messages.Reference):
        yield _inside("reference", FetchCall, one, lambda resource: FetchCall(resource=resource), "json")
    yield _alone("gossip", GossipEnvelope, "msgpack")
    yield _alone("envelope", RequestEnvelope, "msgpack")
    yield _alone("envelope", ResponseEnvelope, "msgpack")
    yield _alone("report", Report, "msgpack")
    for bridge in (TrainJob, messages.AggregateJob):
        yield _alone("bridge-job", bridge, "json", messages.Job)
    for call in (FetchedFile, SendCall, Sent, ReceiveCall, ReceivedFile, SpansCall, BridgeError):
        yield _alone("bridge", call, "json")
    for call in (messages.Trial, messages.TrialReport):
        yield _alone("trial", call, "json")
    yield _alone("host", ForkRequest, "msgpack")
    for one in members(ForkReply):
        yield _alone("host", one, "msgpack", ForkReply)
    for one in members(bulk_wire.Frame):
        yield _alone("frame", one, "frame", bulk_wire.Frame)
    yield _alone("file", LedgerFile, "json")
    for shown in (JobSnapshot, Past, Now):
        yield _alone("status", shown, "json")


def _inside(
    prefix: str, carrier: Any, body: type[Struct], wrap: Callable[[Any], Any], encoding: str = "msgpack"
) -> Kind:
    return Kind(f"{prefix}/{body.__name__}", carrier, encoding, lambda least: wrap(example(body, least)))


def _alone(prefix: str, kind: type[Struct], encoding: str, carrier: Any = None) -> Kind:
    return Kind(f"{prefix}/{kind.__name__}", carrier or kind, encoding, lambda least: example(kind, least))


def members(union: Any) -> tuple[type[Struct], ...]:
    """The kinds of message in ``union``."""
    return typing.get_args(union) if isinstance(union, types.UnionType) else (union,)


# --- examples ---------------------------------------------------------------------------------------------


def example(kind: type[Struct], least: bool = False) -> Any:
    """One of ``kind``, the same each time."""
    return msgspec.convert(_struct(inspect.type_info(kind), least), kind)


def _struct(info: Any, least: bool) -> Any:
    if info.array_like:
        return [_value(field.type, field.encode_name, least) for field in info.fields]
    found: dict[str, Any] = {}
    if info.tag is not None:
        found[info.tag_field] = info.tag
    for field in info.fields:
        fixed = field.encode_name in _FIXED and isinstance(field.type, inspect.IntType)
        if not field.required and (fixed or least):
            continue
        default = _default(field)
        value = _value(field.type, field.encode_name, least)
        if value == default:
            value = _other(field.type, value)
        found[field.encode_name] = value
    return found


def _default(field: Any) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return msgspec.to_builtins(field.default_factory())
    return None if field.default is msgspec.NODEFAULT else msgspec.to_builtins(field.default)


def _value(info: Any, name: str, least: bool) -> Any:
    number = sum(name.encode()) % _LETTERS + 2
    match info:
        case inspect.UnionType(types=options):
            wanted = [one for one in options if not isinstance(one, inspect.NoneType)]
            texts = [one for one in wanted if isinstance(one, inspect.StrType)]
            return _value((texts or wanted)[0], name, least)
        case inspect.StructType():
            return _struct(info, least)
        case inspect.LiteralType(values=values):
            return values[-1]
        case inspect.StrType():
            return name
        case inspect.BoolType():
            return True
        case inspect.IntType():
            return number
        case inspect.FloatType():
            return number + 0.25
        case inspect.BytesType():
            return bytes(range(number))
        case inspect.VarTupleType(item_type=item) | inspect.ListType(item_type=item):
            return [] if least else [_value(item, name, least)]
        case inspect.TupleType(item_types=items):
            return [_value(item, f"{name}{at}", least) for at, item in enumerate(items)]
        case inspect.DictType(value_type=item):
            return {} if least else {"key": _value(item, name, least)}
        case _:
            raise NotImplementedError(f"{name} is {info}: say here what an example of that is")


def _other(info: Any, value: Any) -> Any:
    """Another value than ``value``, where that is the default."""
    if isinstance(info, inspect.LiteralType):
        return info.values[0]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    raise NotImplementedError(f"the example {value!r} of {info} is its default")


# --- what today's code reads ------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """``value`` for a JSON file that people read: every field of a struct, defaults too."""
    if isinstance(value, Struct):
        named = {field: plain(getattr(value, field)) for field in value.__struct_fields__}
        return {"is": type(value).__name__, **named}
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, frozenset):
        return sorted(plain(one) for one in value)
    return value.hex() if isinstance(value, bytes) else value


def check(recorded: Any, today: Any, where: str) -> None:
    """AssertionError that says what to do, unless ``today`` says all that was ``recorded``. A field that was
    added since must be as it is by default: who wrote this did not know of it.
    """
    if not isinstance(today, Struct):
        _check_plain(recorded, today, where)
        return
    assert isinstance(recorded, dict), f"{where}: was {recorded!r} and is a {type(today).__name__} now"
    name = type(today).__name__
    assert recorded.get("is") == name, f"{where}: a {recorded.get('is')} is read as a {name} now"
    fields = {field.name: field for field in msgspec.structs.fields(today)}
    for field in recorded.keys() - {"is"} - fields.keys():
        raise AssertionError(
            f"{where}: {name}.{field} is gone or has another name, but versions that send it are about; keep "
            "it, beside its successor"
        )
    for field_name, field in fields.items():
        found, at = getattr(today, field_name), f"{where}: {name}.{field_name}"
        if field_name in recorded:
            check(recorded[field_name], found, at)
            continue
        default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        assert found == default, f"{at} is new, and {found!r} where nobody sends it: it needs a default"


def _check_plain(recorded: Any, today: Any, where: str) -> None:
    if isinstance(today, dict) and isinstance(recorded, dict):
        assert recorded.keys() == {str(key) for key in today}, f"{where}: other keys: {list(today)}"
        for key, one in today.items():
            check(recorded[str(key)], one, f"{where}[{key}]")
    elif isinstance(today, list | tuple) and isinstance(recorded, list):
        assert len(recorded) == len(today), f"{where}: had {len(recorded)} entries and has {len(today)} now"
        for at, (then, now) in enumerate(zip(recorded, today, strict=True)):
            check(then, now, f"{where}[{at}]")
    else:
        assert recorded == plain(today), (
            f"{where}: was {recorded!r} and is read as {plain(today)!r} now; what an earlier version sent "
            "must mean the same"
        )


def with_strangers(value: Any) -> Any:
    """``value`` as a later version may send it: each struct has a field that nobody knows here."""
    if isinstance(value, Struct):
        config = value.__struct_config__
        if config.array_like:
            return msgspec.to_builtins(value)
        found = {field: with_strangers(getattr(value, field)) for field in value.__struct_fields__}
        if config.tag is not None:
            found[str(config.tag_field)] = config.tag
        return found | {"of_a_later_version": {"type": "unknown", "number": 1}}
    if isinstance(value, dict):
        return {key: with_strangers(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [with_strangers(one) for one in value]
    return value


def words() -> list[str]:
    """All that descriptions of jobs can say, in the form of :func:`hypha.features.words`."""
    found = {f"train.model.task={task}" for task in ("torch", *TASKS)}
    for kind in members(messages.Job):
        info: Any = inspect.type_info(kind)
        found.update(_words(str(info.tag), info))
    return sorted(found)


def _words(path: str, info: Any) -> Iterator[str]:
    match info:
        case inspect.StructType():
            for field in info.fields:
                at = f"{path}.{field.name}"
                yield at
                yield from _words(at, field.type)
        case inspect.UnionType(types=options):
            for option in options:
                if isinstance(option, inspect.StructType) and option.tag is not None:
                    yield f"{path}={option.tag}"
                yield from _words(path, option)
        case inspect.LiteralType(values=values):
            yield from (f"{path}={value}" for value in values)
        case inspect.VarTupleType(item_type=item) | inspect.ListType(item_type=item):
            yield from _words(path, item)


def descriptor() -> ExecutorDescriptor:
    """Of the executors in recorded state."""
    return ExecutorDescriptor(kind="train", name="diloco-transformer")


def peer(name: str = PEER) -> PeerRef:
    """A peer in recorded state."""
    return PeerRef(peer=name, addresses=("/ip4/192.0.2.1/tcp/4001",))
