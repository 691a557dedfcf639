"""What jobs may make this worker fetch, write and run: the owner's allow-lists, and nothing else.

Patterns are shell-style and are matched against the *resolved* thing: a URL in normal form, a local path
after its symbolic links. Whatever could read differently to the pattern and to the one who fetches
(user names in URLs, dot segments, chained file systems) is refused, not interpreted.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from hypha.config.models import AllowConfig
from hypha.errors import Refused
from hypha.messages import AggregateJob, HuggingFace, Job, Local, ModelSpec, Peers, Reference, Uri
from hypha.worker.process import references_of

if TYPE_CHECKING:
    import httpx

GB = 10**9


def _matches(value: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(value, pattern) for pattern in patterns)


class Allowance:
    """The rules of one worker. Everything raises ``Refused("not-allowed")`` that names the setting."""

    def __init__(self, config: AllowConfig) -> None:
        self._config = config
        self.max_file_bytes = int(config.max_file_gb * GB)

    def check_job(self, job: Job) -> None:
        """Before anything of ``job`` is fetched or started."""
        for reference in references_of(job):
            self.check(reference)
        self._check_code(job.model)
        if isinstance(job, AggregateJob) and job.checkpoint.place != "scheduler":
            self.local(job.checkpoint.place)

    def check(self, reference: Reference) -> None:
        """May this be fetched (or, ``Local``, written)?"""
        match reference:
            case Uri(value=value):
                self.uri(value)
            case HuggingFace(repository=repository):
                self._repository(repository)
            case Local(url=url):
                self.local(url)
            case Peers():
                if not self._config.peers:
                    raise Refused("not-allowed", "this worker fetches nothing from peers (allow.peers)")

    def uri(self, value: str) -> httpx.URL:
        """``value`` in normal form; also to be asked about every redirect."""
        import httpx

        try:
            url = httpx.URL(value)
        except (httpx.InvalidURL, ValueError) as exc:
            raise Refused("invalid", f"{value!r} is no URL") from exc
        if url.scheme not in ("http", "https") or not url.host:
            raise Refused("invalid", f"{value!r} is no http(s) URL")
        decoded = unquote(url.raw_path.decode("ascii")).replace("\\", "/")
        if url.userinfo or ".." in decoded.split("?")[0].split("/"):
            raise Refused("invalid", f"{value!r} holds a user name or '..'")
        if not _matches(str(url), self._config.uri):
            raise Refused("not-allowed", f"{url} matches no pattern of allow.uri")
        return url

    def local(self, url: str) -> Path | str:
        """The resolved path, or the fsspec URL as it is."""
        if "::" in url or "\0" in url:
            raise Refused("invalid", f"{url!r} chains file systems; name one")
        scheme, separator, rest = url.partition("://")
        if not separator or scheme in ("file", "local"):
            path = Path(rest if separator else url)
            if not path.is_absolute():
                raise Refused("invalid", f"path {url!r} must be absolute")
            resolved = path.resolve()
            self._local_pattern(str(resolved))
            return resolved
        if ".." in unquote(rest).replace("\\", "/").split("/"):
            raise Refused("invalid", f"{url!r} holds '..'")
        self._local_pattern(url)
        return url

    def _local_pattern(self, place: str) -> None:
        if not _matches(place, self._config.local):
            raise Refused("not-allowed", f"{place} matches no pattern of allow.local")

    def _repository(self, repository: str) -> None:
        if not _matches(repository, self._config.huggingface):
            raise Refused("not-allowed", f"repository {repository} matches no pattern of allow.huggingface")

    def _check_code(self, model: ModelSpec) -> None:
        if model.entrypoint is not None and not _matches(model.entrypoint, self._config.entrypoints):
            raise Refused(
                "not-allowed",
                f"entrypoint {model.entrypoint} matches no pattern of allow.entrypoints in this worker's "
                "configuration",
            )
        if model.trust_remote_code:
            match model.source:
                case HuggingFace(repository=repository):
                    source = repository
                case Uri(value=value):
                    source = value
                case Local(url=url):
                    source = url
                case _:
                    source = "peers"
            if not _matches(source, self._config.trust_remote_code):
                raise Refused("not-allowed", f"code of {source} may not run here (allow.trust_remote_code)")
