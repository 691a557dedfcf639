"""Fetching what a job's references name, each kind behind its allow-list, into a directory of its own.

Size limits hold while reading, not only afterwards; a file has its name only once it is whole. What third
parties raise comes out as ``Refused`` (asking again is no use) or ``TransferFailed`` (it may be).
"""

from __future__ import annotations

import glob
import logging
import shutil
import socket
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

import trio

from hypha.backoff import Backoff
from hypha.config.environment import goes_by_proxy
from hypha.config.networks import is_address
from hypha.errors import Refused, TransferFailed
from hypha.files.beneath import relative_path
from hypha.files.disks import is_disk_full
from hypha.files.staging import StagedFile
from hypha.messages import FileList, HuggingFace, ListFiles, Local, Peers, PullFile, Reference, Uri
from hypha.node import Node
from hypha.runtime import in_thread
from hypha.waiting import in_words, reminded
from hypha.worker.fetch.allowance import Allowance
from hypha.worker.fetch.local import CHUNK_BYTES, fetch_local, safe_name

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger("hypha.worker.fetch")

MAX_REDIRECTS = 5
HTTP_ATTEMPTS = 4
HTTP_FIRST_PAUSE_S = 0.5
CONNECT_S = 10.0
HTTP_S = 30.0
#: What cannot be interrupted may go on for long after its executor has hung up: not in the threads that all
#: of the worker needs.
_THREADS = trio.CapacityLimiter(16)


class Connectors:
    """Fetches what ``allowance`` allows; from peers, through ``node``."""

    def __init__(self, allowance: Allowance, node: Node) -> None:
        self._allowance = allowance
        self._node = node

    async def fetch(self, reference: Reference, directory: Path, job_id: str) -> list[Path]:
        """All files of ``reference``, in the empty ``directory``.

        Raises Refused (asking again is of no use), PeerUnreachable, RequestTimeout, TransferFailed.
        """
        self._allowance.check(reference)
        try:
            match reference:
                case Peers():
                    return await self._fetch_peers(reference, directory, job_id)
                case Uri(value=what):
                    fetch = partial(fetch_uri, what, directory, self._allowance)
                case HuggingFace(repository=what):
                    fetch = partial(fetch_hub, reference, directory, self._allowance.max_file_bytes)
                case Local(url=what):
                    fetch = partial(fetch_local, what, directory, self._allowance)
                case _:
                    raise Refused("invalid", f"{type(reference).__name__} cannot be fetched like this")

            parts = urlsplit(what)
            # without who signs in there, and with what
            place = f"{parts.hostname}{parts.path}" if parts.hostname else parts.path

            def log(lasted_s: float) -> None:
                size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
                text = "Fetching %s goes on since %s: %.1f MB are here."
                logger.info(text, place, in_words(lasted_s), size / 1e6)

            return await reminded(fetch, log)
        except (OSError, TransferFailed) as exc:
            for cause in (exc, exc.__cause__):
                if cause is not None and is_disk_full(cause):
                    raise Refused("no-space", str(cause)) from exc
            raise

    async def _fetch_peers(self, reference: Peers, directory: Path, job_id: str) -> list[Path]:
        """The whole resource, from the first of the peers: an executor may name its scheduler alone."""
        if not reference.peers or not reference.resource:
            raise Refused("invalid", "fetching from peers needs a peer, and the name of a resource")
        peer, (kind, _, name) = reference.peers[0], reference.resource.partition("/")
        listing = ListFiles(kind=kind, name=name, job_id=job_id)
        answer = await self._node.request(peer, listing, timeout_s=30.0)
        if not isinstance(answer, FileList):
            raise Refused("malformed", f"expected a list of files, got {type(answer).__name__}", peer.peer)
        paths = []
        for meta in answer.files:
            if meta.size > self._allowance.max_file_bytes:
                raise Refused("too-large", f"{meta.name} has {meta.size} bytes", peer.peer)
            relative = meta.name.removeprefix(f"{name}/") if name else meta.name
            try:
                path = directory / relative_path(relative)
            except ValueError as exc:
                raise Refused("invalid", f"a file is called {meta.name!r}", peer.peer) from exc
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            full = f"{name}/{relative}" if name else relative
            what = PullFile(kind=kind, name=full, job_id=job_id)
            limit = self._allowance.max_file_bytes
            await self._node.transfers.pull(peer, what, path, meta, limit)
            path.chmod(0o600)
            paths.append(path)
        return paths


async def fetch_uri(value: str, directory: Path, allowance: Allowance) -> list[Path]:
    """Download one address. Every redirect is checked against the allow-list again, and so is each IP address
    that is connected to against ``exclude_cidr``. Broken connections and 5xx answers are tried again a few
    times.
    """
    attempt, backoff = 0, Backoff(HTTP_FIRST_PAUSE_S)
    while True:
        attempt += 1
        try:
            return [await _download(value, directory, allowance, attempt)]
        except TransferFailed as exc:
            if attempt == HTTP_ATTEMPTS:
                raise
            pause_s = backoff.next_s()
            logger.warning("Fetching %s failed: %s. Trying again in %.1f s.", value, exc.reason, pause_s)
            await trio.sleep(pause_s)


async def _download(value: str, directory: Path, allowance: Allowance, attempt: int) -> Path:
    import httpx

    url = allowance.uri(value)
    timeout = httpx.Timeout(HTTP_S, connect=CONNECT_S)
    async with httpx.AsyncClient(timeout=timeout, follow_redirects=False) as client:
        for _ in range(MAX_REDIRECTS + 1):
            place = url
            # the limit counts bytes that come, so none may be unpacked
            headers, extensions = {"accept-encoding": "identity"}, {}
            if not goes_by_proxy(url.scheme, url.host):
                # The address that was judged is the one that is connected to: looked up once more, a name
                # could lead elsewhere. Server and certificate are asked for by the name all the same.
                addresses = await _addresses(url, allowance)
                place = url.copy_with(host=addresses[(attempt - 1) % len(addresses)])
                headers["host"] = url.netloc.decode("ascii")
                extensions["sni_hostname"] = url.host
            elif not allowance.may_reach(url, url.host) and is_address(url.host):
                raise _excluded(url, url.host)
            try:
                async with client.stream("GET", place, headers=headers, extensions=extensions) as response:
                    if response.has_redirect_location:
                        url = allowance.uri(str(url.join(response.headers["location"])))
                        continue
                    _check_status(response, url)
                    return await _save(response, url, directory, allowance.max_file_bytes)
            except httpx.HTTPError as exc:
                raise TransferFailed(url.host, str(url), f"{type(exc).__name__}: {exc}") from exc
    raise Refused("invalid", f"{value} redirects more than {MAX_REDIRECTS} times")


async def _addresses(url: httpx.URL, allowance: Allowance) -> list[str]:
    """The IP addresses that ``url`` may be fetched from. Refused when it has none but excluded ones,
    TransferFailed when its name has none at all.
    """
    try:
        with trio.fail_after(CONNECT_S):
            answers = await trio.socket.getaddrinfo(url.host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, trio.TooSlowError) as exc:
        raise TransferFailed(url.host, str(url), f"its name has no address: {exc}") from exc
    found = list(dict.fromkeys(str(place[0]).partition("%")[0] for *_, place in answers))
    allowed = [address for address in found if allowance.may_reach(url, address)]
    if not allowed:
        raise _excluded(url, ", ".join(found))
    return allowed


def _excluded(url: httpx.URL, addresses: str) -> Refused:
    return Refused(
        "not-allowed",
        f"{url.host} is {addresses}, inside exclude_cidr; take that network out of it, or name the address "
        "itself in allow.uri",
    )


def _check_status(response: httpx.Response, url: httpx.URL) -> None:
    status = response.status_code
    if status >= 500 or status == 429:
        raise TransferFailed(url.host, str(url), f"HTTP status {status}")
    if status != 200:
        code = "not-found" if status in (404, 410) else "not-allowed" if status in (401, 403) else "invalid"
        raise Refused(code, f"{url} answered with HTTP status {status}")


async def _save(response: httpx.Response, url: httpx.URL, directory: Path, max_bytes: int) -> Path:
    announced = response.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise Refused("too-large", f"{url} has {announced} bytes, allowed are {max_bytes}")
    path = directory / safe_name(url.path, "download")
    size = 0
    # It is a generator, though typed as less; left in the middle it would warn when it is collected.
    received = cast(AsyncGenerator[bytes, None], response.aiter_raw(CHUNK_BYTES))
    async with aclosing(received) as chunks:
        with StagedFile(path, durable=True, mode=0o600) as staged:
            async for data in chunks:
                size += len(data)
                if size > max_bytes:
                    raise Refused("too-large", f"{url} has more than the allowed {max_bytes} bytes")
                await in_thread(staged.file.write, data)
            await in_thread(staged.publish)
    return path


async def fetch_hub(
    reference: HuggingFace, directory: Path, max_bytes: int, endpoint: str | None = None
) -> list[Path]:
    """Download a repository's files. Without a token in ``reference`` none is sent: the worker owner's
    own must not open private repositories to other people's jobs. ``endpoint``: default as
    huggingface_hub has it (``HF_ENDPOINT``).
    """
    # The library cannot be interrupted; after a cancellation its thread ends by itself, for nothing.
    return await in_thread(
        _download_repository,
        reference,
        directory,
        max_bytes,
        endpoint,
        abandon_on_cancel=True,
        limiter=_THREADS,
    )


def _download_repository(
    reference: HuggingFace, directory: Path, max_bytes: int, endpoint: str | None
) -> list[Path]:
    # Imported here: it takes half a second, and many workers never need it.
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub
    from huggingface_hub.utils._http import get_session
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    name = f"{reference.repository}@{reference.revision}"
    api = HfApi(endpoint=endpoint, token=reference.token or False)
    try:
        info = api.model_info(reference.repository, revision=reference.revision, files_metadata=True)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        wanted = reference.filenames or tuple(sizes)
        missing = [filename for filename in wanted if filename not in sizes]
        if missing:
            raise Refused("not-found", f"{name} has no file {', '.join(missing)}")
        for filename in wanted:
            if sizes[filename] > max_bytes:
                raise Refused(
                    "too-large", f"{filename} of {name} has {sizes[filename]} bytes, allowed are {max_bytes}"
                )
        api.snapshot_download(
            reference.repository,
            # the commit, so that all files are of one state of a branch that may move meanwhile
            revision=info.sha or reference.revision,
            local_dir=directory,
            allow_patterns=[glob.escape(filename) for filename in wanted],
            max_workers=4,
        )
    except hub.GatedRepoError as exc:
        raise Refused("not-allowed", f"{name} needs a token that was granted access") from exc
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.EntryNotFoundError) as exc:
        raise Refused("not-found", f"{name} is not on the hub, or private: {_first_line(exc)}") from exc
    except hub.HFValidationError as exc:
        raise Refused("invalid", f"{name}: {_first_line(exc)}") from exc
    except (hub.HfHubHTTPError, _http_error_of(get_session()), OSError) as exc:
        raise TransferFailed(endpoint or "the Hugging Face hub", name, _first_line(exc)) from exc
    shutil.rmtree(directory / ".cache", ignore_errors=True)
    paths = [directory / filename for filename in wanted]
    for path in paths:
        path.chmod(0o600)
    return paths


def _http_error_of(session: object) -> type[Exception]:
    """What the hub library's HTTP client raises; which client that is differs from release to release."""
    library = sys.modules[type(session).__module__.partition(".")[0]]
    error: type[Exception] = getattr(library, "HTTPError", OSError)
    return error


def _first_line(exc: BaseException) -> str:
    return next((line for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
