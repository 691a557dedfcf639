"""Fetching from outside the network: http(s), the Hugging Face hub, local paths and fsspec URLs.

Each function fills an existing, empty directory and returns the files. Size limits hold while reading,
not only afterwards; a file has its name only once it is whole. What third parties raise comes out as
``Refused`` (asking again is no use) or ``TransferFailed`` (it may be).
"""

from __future__ import annotations

import logging
import posixpath
import shutil
import socket
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast
from urllib.parse import unquote

import fsspec
import trio

from hypha import beneath
from hypha.backoff import Backoff
from hypha.config.environment import goes_by_proxy
from hypha.config.networks import is_address
from hypha.errors import Refused, TransferFailed
from hypha.messages import HuggingFace
from hypha.runtime import in_thread
from hypha.staging import StagedFile
from hypha.worker.fetch.allowance import Allowance
from hypha.worker.fetch.storing import CHUNK_BYTES, chunks_of, translated

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


def safe_name(name: str, fallback: str) -> str:
    """The last segment of ``name`` as a file name."""
    last = posixpath.basename(unquote(name).replace("\\", "/").rstrip("/"))
    return last if last not in ("", ".", "..") and "\0" not in last and len(last) < 200 else fallback


# --- http(s) -------------------------------------------------------------------------------------------


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


# --- Hugging Face hub ------------------------------------------------------------------------------------


async def fetch_hub(
    reference: HuggingFace, directory: Path, max_bytes: int, endpoint: str | None = None
) -> list[Path]:
    """Download a repository's files. Without a token in ``reference`` none is sent: the worker owner's
    own must not open private repositories to other people's jobs. ``endpoint``: default as
    huggingface_hub has it (``HF_ENDPOINT``).
    """
    # The library cannot be interrupted; after a cancellation its thread ends by itself, unheeded.
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
            allow_patterns=[_literal(filename) for filename in wanted],
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


def _literal(filename: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in filename)


def _first_line(exc: BaseException) -> str:
    return next((line for line in str(exc).splitlines() if line.strip()), type(exc).__name__)


# --- local paths and fsspec ------------------------------------------------------------------------------


async def fetch_local(url: str, directory: Path, allowance: Allowance) -> list[Path]:
    """Copy a file, or all files below a directory, from a local path or any fsspec URL."""
    place = allowance.read_local(url)
    if isinstance(place, Path):
        return await in_thread(_copy_path, place, directory, allowance, limiter=_THREADS)
    # Back ends may be silent for minutes; after a cancellation the thread ends by itself.
    return await in_thread(
        _copy_url, place, directory, allowance.max_file_bytes, abandon_on_cancel=True, limiter=_THREADS
    )


def _copy_path(place: Path, directory: Path, allowance: Allowance) -> list[Path]:
    if place.is_file():
        sources = {place.name: place}
    elif place.is_dir():
        files = sorted(path for path in place.rglob("*") if path.is_file())
        # a link inside an allowed directory may point out of it
        sources = {
            path.relative_to(place).as_posix(): Path(allowance.read_local(str(path))) for path in files
        }
    else:
        raise Refused("not-found", f"no file or directory {place}")
    limit = allowance.max_file_bytes
    try:
        return [_copy_in(partial(_open, path), directory, name, limit) for name, path in sources.items()]
    except OSError as exc:
        raise TransferFailed("this node", str(place), str(exc)) from exc


def _open(path: Path) -> BinaryIO:
    """``path`` was resolved and allowed: whoever puts a link there now does not lead elsewhere."""
    with beneath.directory_below(Path("/"), path.parent.parts[1:]) as directory:
        return open(beneath.open_file(directory, path.name), "rb")


def _copy_url(url: str, directory: Path, max_bytes: int) -> list[Path]:
    with translated(url):
        filesystem, root = fsspec.url_to_fs(url)
        filesystem.invalidate_cache()
        if filesystem.isfile(root):
            sources = {safe_name(root, "file"): root}
        else:
            sources = {posixpath.relpath(path, root.rstrip("/")): path for path in filesystem.find(root)}
        if not sources:
            raise Refused("not-found", f"nothing at {url}")
        return [
            _copy_in(partial(filesystem.open, path, "rb"), directory, name, max_bytes)
            for name, path in sources.items()
        ]


def _copy_in(opener: Callable[[], BinaryIO], directory: Path, name: str, max_bytes: int) -> Path:
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()):
        raise Refused("invalid", f"file name {name!r} leaves the directory")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    size = 0
    with opener() as source, StagedFile(path, durable=True, mode=0o600) as staged:
        for data in chunks_of(source):
            size += len(data)
            if size > max_bytes:
                raise Refused("too-large", f"{name} has more than the allowed {max_bytes} bytes")
            staged.file.write(data)
        staged.publish()
    return path
