"""Checks between keys, of text with a form of its own (addresses, networks, filters), and of what sinks need.

Each check sees a :class:`Settings`, so it runs whatever else is wrong, and says what to do.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from multiaddr import Multiaddr
from multiaddr.exceptions import BinaryParseError, ProtocolLookupError, StringParseError

from hypha.config.job import DEFAULT_EXECUTOR, SinkConfig
from hypha.config.models import (
    DataConfig,
    DatasetConfig,
    ExecutorConfig,
    GatewayConfig,
    LeafConfig,
    NodeConfig,
    SchedulerConfig,
    WorkerConfig,
)
from hypha.config.networks import UrlPattern
from hypha.config.otel import endpoint_problem
from hypha.config.reading.layers import Settings
from hypha.config.reading.lines import KeyPath
from hypha.config.reading.log_filter import parse_filter
from hypha.config.tasks import unknown_task
from hypha.config.tuning import ROUND_TRIPS_A_LEASE
from hypha.decoding import decode
from hypha.errors import Undecodable

Found = Iterator[tuple[KeyPath, str]]

#: the shortest ``hang_s``
LEAST_HANG_S = 5.0
#: sinks that are an optional package of that name
SINK_PACKAGES = ("tensorboard", "trackio", "wandb", "aim")

_JOB = ("scheduler", "job")
_RESOURCES = (*_JOB, "resources")
#: a table, a key in it, and the key there that it must not be more than
_NO_MORE_THAN: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("tuning", "gossip"), "degree_low", "degree"),
    (("tuning", "gossip"), "degree", "degree_high"),
    (("tuning", "connections"), "unproven_per_address", "unproven"),
    (("tuning", "liveness"), "reconnect_min_s", "reconnect_max_s"),
    ((*_JOB, "rounds"), "batch_size", "max_batch_size"),
    (_RESOURCES, "min_workers", "num_workers"),
    ((*_RESOURCES, "worker_price"), "bid", "max"),
    ((*_RESOURCES, "parameter_server_price"), "bid", "max"),
)
_PEER_ID = re.compile(r"[1-9A-HJ-NP-Za-km-z]{32,64}")
_MALFORMED = (ValueError, BinaryParseError, StringParseError, ProtocolLookupError)


def cross_checks(settings: Settings) -> Found:
    """Every problem between valid values, as (key path, message)."""
    model = settings.model
    if issubclass(model, NodeConfig):
        yield from _node(settings)
    if issubclass(model, LeafConfig | GatewayConfig):
        yield from _gateways(settings)
    if issubclass(model, DataConfig):
        yield from _data(settings)
    if issubclass(model, WorkerConfig):
        yield from _worker(settings)
        yield from _leases(settings)
        yield from _offer(settings)
    if issubclass(model, SchedulerConfig):
        yield from _job(settings)
        yield from _rounds(settings)
        for index, sink in enumerate(settings.get("scheduler", "sinks") or ()):
            for key, message in _sink(sink):
                yield ("scheduler", "sinks", index, key), message
    yield from _no_more_than(settings)


def _node(settings: Settings) -> Found:
    for key in ("listen_addresses", "external_addresses", "gateway_addresses"):
        for index, text in enumerate(settings.get(key) or ()):
            if (wrong := _address_problem(text)) is not None:
                yield (key, index), wrong
    for index, text in enumerate(settings.get("exclude_cidr") or ()):
        try:
            ipaddress.ip_network(text)
        except ValueError as exc:
            yield ("exclude_cidr", index), f"it is no network such as 10.0.0.0/8: {exc}"
    if (address := settings.get("http_address")) is not None:
        host, colon, port = address.rpartition(":")
        if not (colon and host and port.isdigit() and int(port) < 65536):
            yield ("http_address",), f"it should be host:port, such as 127.0.0.1:9000, not {address!r}"
    endpoint, protocol = settings.get("telemetry_endpoint"), settings.get("telemetry_protocol")
    if endpoint is not None and (wrong := endpoint_problem(endpoint, protocol or "http/protobuf")):
        yield ("telemetry_endpoint",), wrong
    if (text := settings.get("log_level")) is not None:
        try:
            parse_filter(text)
        except ValueError as exc:
            yield ("log_level",), str(exc)

    for index, hours in enumerate(settings.get("limits", "schedule") or ()):
        at = ("limits", "schedule", index)
        if hours.start == hours.to:
            yield at, f'it begins and ends at {hours.to}; for the whole day write "00:00" to "24:00"'
        if hours.upload_mbit is None and hours.download_mbit is None:
            yield at, "it changes nothing; set upload_mbit or download_mbit"


def _no_more_than(settings: Settings) -> Found:
    for at, lower, upper in _NO_MORE_THAN:
        less, more = settings.get(*at, lower), settings.get(*at, upper)
        if less is not None and more is not None and less > more:
            name = f"tuning.{at[1]}.{upper}" if at[0] == "tuning" else upper
            yield (
                (*at, lower),
                f"it is more than {name} ({more if isinstance(more, int) else format(more, 'g')})",
            )


def _leases(settings: Settings) -> Found:
    """A renewal is sent when three quarters of a lease are over, and one whole attempt must fit into what is
    left; the acceptance of an offer takes a journey there and one back.
    """
    round_trip_s = settings.get("tuning", "liveness", "round_trip_s")
    if round_trip_s is None:
        return
    for key, least, why in (
        ("lease_s", ROUND_TRIPS_A_LEASE, "a renewal would come too late"),
        ("temporary_lease_s", 2, "an offer would be over before it is accepted"),
    ):
        life_s = settings.get("offer", key)
        if life_s is not None and life_s < least * round_trip_s:
            yield (
                ("offer", key),
                f"{why}: it must be {least} times tuning.liveness.round_trip_s ({round_trip_s:g} s), "
                f"{least * round_trip_s:g} s at least, not {life_s:g}",
            )


def _address_problem(text: str) -> str | None:
    example = "such as /ip4/192.0.2.1/tcp/8080 or /dns4/gateway.example.org/tcp/8080"
    try:
        names = [protocol.name for protocol in Multiaddr(text).protocols()]
    except _MALFORMED as exc:
        return f"{text!r} is no multiaddr ({exc}); it should be one {example}"
    if len(names) < 2 or names[0] not in ("ip4", "ip6", "dns", "dns4", "dns6") or names[1] != "tcp":
        return f"{text!r} is no TCP address; it should be one {example}"
    if names[2:] not in ([], ["p2p"]):
        return f"{text!r} goes on after the port; only /p2p/<PeerID> may follow"
    return None


def _gateways(settings: Settings) -> Found:
    networks = []
    for text in settings.get("exclude_cidr") or ():
        try:
            networks.append(ipaddress.ip_network(text))
        except ValueError:
            continue
    for index, text in enumerate(settings.get("gateway_addresses") or ()):
        try:
            host = str(Multiaddr(text)).split("/")[2]
            ip = ipaddress.ip_address(host)
        except _MALFORMED:
            continue
        if (network := next((one for one in networks if ip in one), None)) is not None:
            yield (
                ("gateway_addresses", index),
                f"the gateway {host} is inside {network} of exclude_cidr and would never be dialled; set "
                "exclude_cidr without that network",
            )


def _data(settings: Settings) -> Found:
    names: dict[str, KeyPath] = {}
    datasets = settings.get("datasets") or []
    short: Path | None = settings.get("dataset_path")
    if not datasets and short is None and settings.get("datasets") is not None:
        yield ("datasets",), "there is no dataset to serve; set dataset_path, or add a [[datasets]] table"
    entries: list[tuple[KeyPath, DatasetConfig]] = [
        (("datasets", index), entry) for index, entry in enumerate(datasets)
    ]
    if short is not None:
        entries.append((("dataset_path",), DatasetConfig(path=short)))
    for loc, entry in entries:
        where = loc if loc == ("dataset_path",) else (*loc, "path")
        if not entry.path.is_dir():
            yield where, f"{entry.path} is no directory; make one with `hypha-data prepare`"
        name = entry.name or entry.path.name
        if name in names:
            yield loc, f"two datasets are called {name!r}; give one of them another `name`"
        names.setdefault(name, loc)


def _hang(hang_s: float | None, at: KeyPath) -> Found:
    """Signs of life come once a second; a machine under load is late with them."""
    if hang_s and hang_s < LEAST_HANG_S:
        yield (*at, "hang_s"), f"healthy executors would be taken for hung; give it at least {LEAST_HANG_S:g}"


def _worker(settings: Settings) -> Found:
    seen = set()
    for index, executor in enumerate(settings.get("executors") or ()):
        if (executor.kind, executor.name) in seen:
            yield ("executors", index), f"there are two {executor.kind} executors called {executor.name!r}"
        seen.add((executor.kind, executor.name))
        yield from _hang(executor.hang_s, ("executors", index))
        if executor.read_only and executor.runtime != "bwrap":
            yield (
                ("executors", index, "read_only"),
                'a process reads all that this worker may; add runtime = "bwrap"',
            )
        if executor.accelerate is not None:
            yield from _accelerate(executor, ("executors", index, "accelerate"))
        for number, path in enumerate(executor.read_only):
            if not path.is_absolute():
                yield ("executors", index, "read_only", number), f"{path} must be an absolute path"
    yield from _patterns(settings)
    yield from _preemption(settings)
    yield from _hang(settings.get("hang_s"), ())
    work_dir: Path | None = settings.get("work_dir")
    if work_dir is not None and work_dir.exists() and not work_dir.is_dir():
        yield ("work_dir",), f"{work_dir} is a file; a directory is needed"


def _preemption(settings: Settings) -> Found:
    """What is polled is of no use without the time that a notice leaves."""
    ways = [key for key in ("file", "command", "url") if settings.get("preemption", key)]
    notice_s, poll_s = (settings.get("preemption", key) for key in ("notice_s", "poll_s"))
    if ways and notice_s is None:
        yield (
            ("preemption", "notice_s"),
            f"say how many seconds before the machine's end a notice ({', '.join(ways)}) comes (AWS 120, "
            "Google Cloud and Azure 30)",
        )
    if ways and notice_s is not None and poll_s is not None and poll_s > notice_s / 2:
        yield (
            ("preemption", "poll_s"),
            f"a notice of {notice_s:g} s may be seen after {poll_s:g}; look at least twice in that time",
        )
    url = settings.get("preemption", "url")
    if url is not None and not re.match(r"https?://[^/]+", url):
        yield ("preemption", "url"), f"{url} is no http or https address"
    try:
        re.compile(settings.get("preemption", "url_pattern") or "")
    except re.error as exc:
        yield ("preemption", "url_pattern"), f"it is no regular expression: {exc}"


def _accelerate(executor: ExecutorConfig, at: KeyPath) -> Found:
    if executor.cmd is not None or executor.kind != "train":
        yield (
            at,
            "it is for Hypha's own training executor; leave out cmd, or start accelerate in cmd and args",
        )
    elif executor.accelerate is not None and not executor.accelerate.is_file():
        yield at, f"there is no file {executor.accelerate}; write it with `accelerate config --config_file`"


def _patterns(settings: Settings) -> Found:
    """Those of URLs: one that cannot be read would match nothing."""
    for key in ("uri", "local_read", "local_write", "trust_remote_code"):
        for index, text in enumerate(settings.get("allow", key) or ()):
            if key != "uri" and "://" not in text:
                continue
            try:
                UrlPattern.parse(text)
            except ValueError as exc:
                yield ("allow", key, index), str(exc)


def _offer(settings: Settings) -> Found:
    load = settings.get("offer", "utilization")
    if load is not None and load.low >= load.high:
        wrong = f"it must be less than high ({load.high:g}): the price stays as it is between the two"
        yield ("offer", "utilization", "low"), wrong
    yield from _peer_ids(settings, ("offer", "affinity"), "schedulers")


def _peer_ids(settings: Settings, at: tuple[str, ...], key: str) -> Found:
    for index, text in enumerate(getattr(settings.get(*at), key, ())):
        if not _PEER_ID.fullmatch(text):
            yield (*at, key, index), f"{text!r} is no PeerID, such as 12D3KooW..."


def _job(settings: Settings) -> Found:
    model = settings.get(*_JOB, "model")
    if model is not None:
        given = [name for name in ("path", "repository", "entrypoint") if getattr(model, name) is not None]
        if len(given) != 1:
            listed = " and ".join(given) or "none"
            yield (
                (*_JOB, "model"),
                f"exactly one of path, repository and entrypoint says where the model is from, not {listed}",
            )
        elif (model.type == "torch") != (given == ["entrypoint"]):
            yield (*_JOB, "model", "type"), 'type = "torch" and entrypoint belong together'
        # somebody else's executor may know tasks of its own
        ours = settings.get(*_JOB, "resources", "worker_executor") in (None, DEFAULT_EXECUTOR)
        if ours and (wrong := unknown_task(model.type)) is not None:
            yield (*_JOB, "model", "type"), wrong
        if model.path is not None and (wrong := _model_problem(model.path)) is not None:
            yield (*_JOB, "model", "path"), wrong
    preprocessor = settings.get(*_JOB, "preprocessor")
    if preprocessor is not None and (preprocessor.path is None) == (preprocessor.repository is None):
        yield (*_JOB, "preprocessor"), "exactly one of path and repository says where it is from"
    if preprocessor is not None and preprocessor.path is not None and not preprocessor.path.is_dir():
        yield (*_JOB, "preprocessor", "path"), f"{preprocessor.path} is no directory"
    yield from _hang(settings.get(*_RESOURCES, "hang_s"), _RESOURCES)
    yield from _peer_ids(settings, (*_JOB, "dataset"), "data_nodes")
    checkpoint = settings.get(*_JOB, "checkpoint")
    if checkpoint is not None and checkpoint.replicas and checkpoint.place != "scheduler":
        yield (
            (*_JOB, "checkpoint", "replicas"),
            'there are copies of what the scheduler keeps only; set place = "scheduler", or replicas = 0',
        )


def _model_problem(path: Path) -> str | None:
    should = "it should hold config.json, and weights if there are any"
    if not path.is_dir():
        return f"{path} is no directory; {should}"
    try:
        described = decode(json.loads, (path / "config.json").read_bytes())
    except FileNotFoundError:
        return f"{path} has no config.json; {should}"
    except OSError as exc:
        return f"{path / 'config.json'} cannot be read ({exc.strerror})"
    except Undecodable as exc:
        return f"{path / 'config.json'} is not JSON ({exc})"
    if not isinstance(described, dict):
        return f"{path / 'config.json'} should be a JSON object"
    return None


def _rounds(settings: Settings) -> Found:
    rounds = settings.get(*_JOB, "rounds")
    if rounds is None:
        return
    if (rounds.avg_samples_between_updates is None) == (rounds.inner_steps is None):
        yield (
            (*_JOB, "rounds"),
            "exactly one of avg_samples_between_updates and inner_steps says how long a round is",
        )
    if rounds.batch_size is not None and rounds.grow_batch_size:
        yield (
            (*_JOB, "rounds", "grow_batch_size"),
            "batch_size says how large batches are; leave one of them out",
        )
    schedule = settings.get(*_JOB, "schedule")
    if schedule is not None and schedule.type != "constant" and not schedule.training_steps:
        yield (*_JOB, "schedule", "training_steps"), f"a {schedule.type} schedule needs it"


def _sink(sink: SinkConfig) -> Iterator[tuple[str, str]]:
    if sink.type in SINK_PACKAGES and find_spec(sink.type) is None:
        yield "type", f"the package {sink.type} is not installed: pip install 'hypha-train[{sink.type}]'"
    if sink.type == "http" and sink.url is None:
        yield "url", "it says where the figures are sent, such as http://127.0.0.1:43800"
    if sink.url is not None:
        yield from _sink_url(sink.type, sink.url)
    if sink.offline and sink.type != "wandb":
        yield "offline", "only wandb has that"


def _sink_url(kind: str, url: str) -> Iterator[tuple[str, str]]:
    if kind == "tensorboard":
        yield "url", "TensorBoard has none; directory says where its files are written"
        return
    schemes = ("aim",) if kind == "aim" else ("http", "https")
    try:
        parts = urlsplit(url)
        named = parts.scheme in schemes and bool(parts.hostname)
    except ValueError:
        named = False
    if not named:
        yield "url", f"it should begin with {' or '.join(f'{one}://' for one in schemes)} and name a host"
    elif parts.username is not None or parts.query:
        # addresses are logged and shown, by others too
        yield "url", "a secret has no place in an address; write it as token"
