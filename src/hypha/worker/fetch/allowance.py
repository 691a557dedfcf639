"""What jobs may make this worker fetch, write and run: the owner's allow-lists, and nothing else.

Patterns are matched against the *resolved* thing: a URL in normal form, part by part
(:mod:`hypha.config.networks`), a local path after its symbolic links (shell-style). Whatever could read
differently to the pattern and to the one who fetches (user names in URLs, dot segments, chained file systems)
is refused, not interpreted. The machines behind a host's name are judged when it is fetched from:
:meth:`Allowance.may_reach`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from hypha.config.models import AllowConfig
from hypha.config.networks import ExcludedNetworks, UrlPattern, is_address, split_place
from hypha.errors import Refused
from hypha.messages import AggregateJob, HuggingFace, Job, Local, ModelSpec, Peers, Reference, Uri
from hypha.worker.processes.process import references_of

if TYPE_CHECKING:
    import httpx

GB = 10**9

#: A callable's own name, and that of the module that defines it: no walk through attributes, no other text.
_ENTRYPOINT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_REPOSITORY = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*", re.ASCII)
#: Fetched by their own connector, which follows no redirect unasked and looks at each address.
_HTTP = ("http", "https")


class Allowance:
    """The rules of one worker, ``exclude_cidr`` among them. Everything raises ``Refused("not-allowed")`` that
    names the setting, or ``Refused("invalid")``.
    """

    def __init__(self, config: AllowConfig, exclude_cidr: Sequence[str] = ()) -> None:
        self._config = config
        self._excluded = ExcludedNetworks(exclude_cidr)
        self._uris = _parsed(config.uri)
        self._code = _parsed(config.trust_remote_code)
        self.max_file_bytes = int(config.max_file_gb * GB)

    def check_job(self, job: Job) -> None:
        """Before anything of ``job`` is fetched or started."""
        for reference in references_of(job):
            self.check(reference)
        self._check_code(job.model)
        if isinstance(job, AggregateJob) and job.checkpoint.place != "scheduler":
            self.write_local(job.checkpoint.place)
            # a job that writes checkpoints and could not go on from them would find out when it is too late
            self.read_local(job.checkpoint.place)

    def check(self, reference: Reference) -> None:
        match reference:
            case Uri(value=value):
                self.uri(value)
            case HuggingFace(repository=repository):
                if not _REPOSITORY.fullmatch(repository):
                    raise Refused("invalid", f"{repository!r} is no repository such as organisation/name")
                if not _matches_repository(repository, self._config.huggingface):
                    text = f"repository {repository} matches no pattern of allow.huggingface"
                    raise Refused("not-allowed", text)
            case Local(url=url):
                self.read_local(url)
            case Peers():
                if not self._config.peers:
                    raise Refused("not-allowed", "this worker fetches nothing from peers (allow.peers)")

    def uri(self, value: str) -> httpx.URL:
        """``value`` in normal form; also to be asked about every redirect."""
        url = _normal(value)
        if not any(_matches_url(pattern, url) for pattern in self._uris):
            raise Refused("not-allowed", f"{url} matches no pattern of allow.uri")
        return url

    def may_reach(self, url: httpx.URL, address: str) -> bool:
        """Whether ``url`` may be fetched from the IP ``address``, which its host is or stands for: not inside
        ``exclude_cidr``, unless a pattern of the owner's has that very address as its host.
        """
        try:
            ip = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return False
        if not self._excluded.holds(ip):
            return True
        literal = f"[{url.host}]" if ":" in url.host else url.host
        return is_address(url.host) and any(
            pattern.names_host(literal) for pattern in self._uris if _matches_url(pattern, url)
        )

    def read_local(self, url: str) -> Path | str:
        """The resolved path, or the fsspec URL as it is, to read from."""
        return _local(url, self._config.local_read, "allow.local_read")

    def write_local(self, url: str) -> Path | str:
        """The same, to write to."""
        return _local(url, self._config.local_write, "allow.local_write")

    def _check_code(self, model: ModelSpec) -> None:
        if model.entrypoint is not None:
            self._check_entrypoint(model.entrypoint)
        if model.trust_remote_code and not self._trusts(model.source):
            match model.source:
                case HuggingFace(repository=source) | Uri(value=source) | Local(url=source):
                    pass
                case _:
                    source = "peers"
            raise Refused("not-allowed", f"code of {source} may not run here (allow.trust_remote_code)")

    def _trusts(self, source: Reference | None) -> bool:
        patterns = self._config.trust_remote_code
        match source:
            case HuggingFace(repository=repository):
                return _matches_repository(repository, patterns)
            case Uri(value=value):
                url = _normal(value)
                return any(_matches_url(pattern, url) for pattern in self._code)
            case Local(url=place):
                try:
                    _local(place, patterns, "allow.trust_remote_code")
                except Refused:
                    return False
                return True
            case _:
                return "peers" in patterns or "*" in patterns

    def _check_entrypoint(self, entrypoint: str) -> None:
        if not _ENTRYPOINT.fullmatch(entrypoint):
            raise Refused(
                "invalid",
                f"entrypoint {entrypoint!r} is not package.module:name, a class's or function's plain name",
            )
        module, name = entrypoint.split(":")
        for pattern in self._config.entrypoints:
            modules, _, names = pattern.partition(":")
            if fnmatchcase(module, modules) and fnmatchcase(name, names or "*"):
                return
        raise Refused(
            "not-allowed",
            f"entrypoint {entrypoint} matches no pattern of allow.entrypoints in this worker's configuration",
        )


def _parsed(patterns: Sequence[str]) -> tuple[UrlPattern, ...]:
    """Those that are patterns of URLs: a configuration was checked, and other lists hold others, too."""
    found = []
    for text in patterns:
        try:
            found.append(UrlPattern.parse(text))
        except ValueError:
            continue
    return tuple(found)


def _normal(value: str) -> httpx.URL:
    import httpx

    try:
        url = httpx.URL(value)
    except (httpx.InvalidURL, ValueError) as exc:
        raise Refused("invalid", f"{value!r} is no URL") from exc
    if url.scheme not in _HTTP or not url.host:
        raise Refused("invalid", f"{value!r} is no http(s) URL")
    # What stands before an @ is a user name, even where nothing is left of it. A host that is no plain name
    # may be read in more than one way.
    place = value.partition("://")[2].replace("\\", "/").partition("/")[0].partition("?")[0].partition("#")[0]
    if url.userinfo or "@" in place or "%" in url.host:
        raise Refused("invalid", f"{value!r} holds a user name, or a host that is no plain name")
    if _climbs(url.raw_path.decode("ascii").partition("?")[0]):
        raise Refused("invalid", f"{value!r} holds '..'")
    return url


def _climbs(path: str) -> bool:
    """Whether it holds dot segments, for those too who decode it twice or cut off parameters."""
    for _ in range(3):
        path = unquote(path).replace("\\", "/")
    return any(segment.partition(";")[0] == ".." for segment in path.split("/"))


def _matches_url(pattern: UrlPattern, url: httpx.URL) -> bool:
    path, _, query = url.raw_path.decode("ascii").partition("?")
    host = f"[{url.host}]" if ":" in url.host else url.host
    return pattern.matches(url.scheme, "", host, str(url.port or ""), path, query)


def _matches_repository(repository: str, patterns: Sequence[str]) -> bool:
    """Owner and name each by itself, so that ``acme/*`` and ``acme*`` are no other owner's."""
    owner, slash, name = repository.rpartition("/")
    for pattern in patterns:
        owners, divided, names = pattern.rpartition("/")
        if pattern == "*" or (
            divided == slash
            and fnmatchcase(owner, owners)
            and fnmatchcase(name, names)
            and "://" not in pattern
        ):
            return True
    return False


def _local(url: str, patterns: Sequence[str], setting: str) -> Path | str:
    if "::" in url or "\0" in url:
        raise Refused("invalid", f"{url!r} chains file systems; name one")
    scheme, separator, rest = url.partition("://")
    if not separator or scheme in ("file", "local"):
        path = Path(rest if separator else url)
        if not path.is_absolute():
            raise Refused("invalid", f"path {url!r} must be absolute")
        resolved = path.resolve()
        if not any(fnmatchcase(str(resolved), pattern) for pattern in patterns if "://" not in pattern):
            raise Refused("not-allowed", f"{resolved} matches no pattern of {setting}")
        return resolved
    if scheme.lower() in _HTTP:
        raise Refused("invalid", f"{url!r} is no place of files; name it as a URL to fetch (allow.uri)")
    if _climbs(rest):
        raise Refused("invalid", f"{url!r} holds '..'")
    place, slash, path_text = rest.partition("/")
    user, host, port = split_place(place)
    if not any(pattern.matches(scheme, user, host, port, slash + path_text) for pattern in _parsed(patterns)):
        raise Refused("not-allowed", f"{url} matches no pattern of {setting}")
    return url
