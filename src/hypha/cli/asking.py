"""How commands ask a node: over its local HTTP, or in the network, as a guest with the certificate of any
component's configuration, beside the node that may run with it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import httpx
import trio
import typer

from hypha.cli.options import DEFAULT_CONFIG
from hypha.cli.running import run_until_signal
from hypha.decoding import decode_json
from hypha.errors import ConfigError, HyphaError, RequestTimeout, Undecodable
from hypha.messages import Health, HealthReport, Response

if TYPE_CHECKING:
    from hypha.config.models import NodeConfig
    from hypha.net import ConnectionInfo, Libp2pNode, NodeOptions

T = TypeVar("T")

_HTTP_S = 5.0


class NotThere(HyphaError):
    """An address answers, and has no such path."""


class Unanswered(HyphaError):
    """There is no node at the address, or not any more."""


def any_component(path: Path | None) -> NodeConfig:
    """That of whichever component it is. Raises the ConfigError of the one that fits best."""
    from hypha.config.models import COMPONENTS
    from hypha.config.reading.loading import load_config

    path = path or DEFAULT_CONFIG
    if not path.exists():
        raise ConfigError(f"there is no {path}: name the configuration of a component with --config")
    problems: list[ConfigError] = []
    for model in COMPONENTS.values():
        try:
            return load_config(model, path)
        except ConfigError as exc:
            problems.append(exc)
    raise min(problems, key=lambda one: len(one.problems))


def as_guest(
    options: NodeOptions,
    timeout_s: float,
    asked: str,
    what: str,
    ask: Callable[[Libp2pNode], Awaitable[T]],
) -> T:
    """What ``ask`` finds with a node of ``options``. Raises NetworkError, or RequestTimeout."""
    from hypha.config.reading.log_filter import parse_filter
    from hypha.net import open_node
    from hypha.telemetry.logs import configure_logging

    # one line says why it failed, so that what is logged on the way there is no news
    configure_logging(options.component, parse_filter("error"), "text")
    found: list[T] = []

    async def run() -> None:
        with trio.move_on_after(timeout_s) as scope:
            async with open_node(options) as node:
                if options.gateways:
                    await node.wait_connected()
                found.append(await ask(node))
                # that we hang up now is no news
                logging.getLogger("hypha.net").setLevel(logging.CRITICAL)
        if scope.cancelled_caught:
            raise RequestTimeout(asked, what, timeout_s)

    if (code := run_until_signal(run)) != 0:
        raise typer.Exit(code)
    return found[0]


async def ask_health(
    node: Libp2pNode, peer: str, timeout_s: float
) -> tuple[Response, float, ConnectionInfo | None]:
    """What a connected ``peer`` answers, after how many seconds, and the connection. Raises NetworkError."""
    asked = trio.current_time()
    answer = await node.request(peer, Health(), timeout_s)
    took_s = trio.current_time() - asked
    return answer, took_s, next((one for one in node.connections() if one.peer == peer), None)


def ask_local(address: str, path: str, kind: type[T], token: str = "") -> T:
    """What its local HTTP answers. Raises HyphaError: Unanswered, NotThere for a path that it has not."""
    url, answer = get_local(address, path, token)
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        raise HyphaError(f"{url} asks for the token of its job's state directory: --token FILE")
    if answer.status_code == httpx.codes.NOT_FOUND:
        raise NotThere(f"{url} is not there: is that the address of another component, or an older one?")
    if answer.status_code != httpx.codes.OK:
        raise HyphaError(f"{url} answers with HTTP status {answer.status_code}: {answer.text.strip()[:200]}")
    try:
        return decode_json(answer.content, kind)
    except Undecodable as exc:
        raise HyphaError(f"{url} is not what this version reads: {exc}") from exc


def local_health(address: str) -> HealthReport:
    """What the node whose local HTTP is at ``address`` says of its health, good or bad. Raises HyphaError."""
    url, answer = get_local(address, "health")
    try:
        return decode_json(answer.content, HealthReport)
    except Undecodable as exc:
        raise HyphaError(f"{url} is not what a node says of its health: {exc}") from exc


def get_local(address: str, path: str, token: str = "") -> tuple[str, httpx.Response]:
    """The URL of ``path`` at local HTTP, and the answer, whatever its status. Raises Unanswered."""
    url = f"{address if '://' in address else f'http://{address}'}".rstrip("/") + f"/{path}"
    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        return url, httpx.get(url, headers=headers, timeout=_HTTP_S, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise Unanswered(
            f"{url} does not answer: {exc}; is that the http_address of a running node?"
        ) from exc
