"""Checks of ``[[scheduler.sinks]]``: what a sink needs is there before a job begins."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from urllib.parse import urlsplit

from hypha.config.job import SinkConfig
from hypha.config.reading.lines import KeyPath
from hypha.config.reading.partial import Partial

#: sinks that are an optional package of that name
PACKAGES = ("tensorboard", "trackio", "wandb", "aim")


def sink_problems(partial: Partial) -> Iterator[tuple[KeyPath, str]]:
    """Every problem, as (key path, message)."""
    for index, sink in enumerate(partial.get("scheduler", "sinks") or ()):
        for key, message in _problems(sink):
            yield ("scheduler", "sinks", index, key), message


def _problems(sink: SinkConfig) -> Iterator[tuple[str, str]]:
    if sink.type in PACKAGES and find_spec(sink.type) is None:
        yield "type", f"the package {sink.type} is not installed: pip install 'hypha-train[{sink.type}]'"
    if sink.type == "http" and sink.url is None:
        yield "url", "it says where the figures are sent, such as http://127.0.0.1:43800"
    if sink.url is not None:
        yield from _url_problems(sink.type, sink.url)
    if sink.offline and sink.type != "wandb":
        yield "offline", "only wandb has that"


def _url_problems(kind: str, url: str) -> Iterator[tuple[str, str]]:
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
