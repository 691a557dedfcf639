"""A Hugging Face hub on this machine: the routes that huggingface_hub uses to read a repository and to commit
to one, over real HTTP, with repositories in memory.

It speaks the LFS batch protocol for large files, so a client has to be told ``HF_HUB_DISABLE_XET=1``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Answer = tuple[int, dict[str, str], bytes]
#: larger files, and all weights, go by LFS
REGULAR_BYTES = 10_000


@contextmanager
def http_server(answer: Callable[[BaseHTTPRequestHandler], Answer]) -> Iterator[str]:
    """A real HTTP server; ``answer(request)`` gives status, headers and body."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, body = answer(self)
            self.send_response(status)
            if "transfer-encoding" not in headers:
                headers = {"content-length": str(len(body)), **headers}
            headers = {"connection": "close", **headers}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
            self.close_connection = True

        do_HEAD = do_POST = do_PUT = do_GET

        def log_message(self, format: str, *args: object) -> None: ...

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.server_port}"
    finally:
        listener.shutdown()
        thread.join()
        listener.server_close()


def _json(value: object, status: int = 200) -> Answer:
    return status, {"content-type": "application/json"}, json.dumps(value).encode()


def _refused(status: int, code: str, text: str) -> Answer:
    return status, {"x-error-code": code, "x-error-message": text}, json.dumps({"error": text}).encode()


@dataclass
class Repository:
    """One branch; ``commits`` holds each commit's whole tree, oldest first. Writing takes ``writer``, and
    with ``private`` so does reading.
    """

    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    messages: list[str] = field(default_factory=list)
    branch: str = "main"
    writer: str | None = None
    private: bool = False
    gated: bool = False

    @property
    def files(self) -> dict[str, bytes]:
        """The newest tree."""
        return self.commits[-1]

    @property
    def sha(self) -> str:
        """Of the newest commit."""
        return f"{len(self.commits):040x}"


class Hub:
    """``repositories`` by name. ``asked`` and ``tokens`` note what came; ``broken`` is a set of words: a
    request whose path holds one of them is answered with status 400.
    """

    def __init__(
        self,
        repositories: dict[str, Repository] | None = None,
        users: Collection[str] | Mapping[str, str] = (),
    ) -> None:
        self.repositories = dict(repositories or {})
        #: names by token; without names the token is the name
        self.users = dict(users) if isinstance(users, Mapping) else {one: one for one in users}
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.broken: set[str] = set()
        self._blobs: dict[str, bytes] = {}
        self._base = ""

    @contextmanager
    def serve(self) -> Iterator[str]:
        """Its address."""
        with http_server(self.answer) as base:
            self._base = base
            yield base

    def answer(self, request: BaseHTTPRequestHandler) -> Answer:
        """Any request."""
        body = request.rfile.read(int(request.headers.get("content-length") or 0))
        path = unquote(urlsplit(request.path).path)
        authorization = request.headers.get("authorization")
        token = authorization.removeprefix("Bearer ") if authorization else None
        self.tokens.add(token)
        self.asked.append(path)
        if any(word in path for word in self.broken):
            return _refused(400, "Broken", "the hub has a bad day")
        if request.command in ("POST", "PUT"):
            return self._write(path, token, body)
        if path == "/api/whoami-v2":
            if token not in self.users:
                return _refused(401, "", "Invalid username or password.")
            return _json({"type": "user", "name": self.users[token], "orgs": []})
        return self._read(path, token)

    # --- reading ----------------------------------------------------------------------------------

    def _named(self, path: str) -> tuple[str, Repository | None]:
        for name, repository in self.repositories.items():
            if path == name or path.startswith((f"{name}/", f"{name}.git/")):
                return name, repository
        return path, None

    def _read(self, path: str, token: str | None) -> Answer:
        name, repository = self._named(path.removeprefix("/api/models/").removeprefix("/"))
        if repository is None or (repository.private and token != repository.writer):
            return _refused(401, "RepoNotFound", "Repository not found")
        if repository.gated:
            return _refused(403, "GatedRepo", "gated")
        files, revisions = repository.files, (repository.branch, repository.sha)
        if path.startswith("/api/models/"):
            rest = path.removeprefix(f"/api/models/{name}").strip("/").split("/")
            if rest[0] == "tree":
                return _json(
                    [
                        {
                            "type": "file",
                            "path": one,
                            "size": len(data),
                            "oid": hashlib.sha1(data).hexdigest(),
                        }
                        for one, data in files.items()
                    ]
                )
            if rest[0] == "revision" and rest[1] not in revisions:
                return _refused(404, "RevisionNotFound", "Revision not found")
            siblings = [{"rfilename": one, "size": len(data), "blobId": "b"} for one, data in files.items()]
            about = {"_id": "1", "id": name, "modelId": name, "sha": repository.sha, "private": False}
            return _json({**about, "siblings": siblings, "tags": []})
        for revision in revisions:
            file = path.removeprefix(f"/{name}/resolve/{revision}/")
            if file in files:
                etag = f'"{hashlib.sha1(files[file]).hexdigest()}"'
                return 200, {"etag": etag, "x-repo-commit": repository.sha}, files[file]
        return _refused(404, "EntryNotFound", "Entry not found")

    # --- writing ----------------------------------------------------------------------------------

    def _write(self, path: str, token: str | None, body: bytes) -> Answer:
        if path.startswith("/blobs/"):  # its address is secret, as a signed one is
            self._blobs[path.removeprefix("/blobs/")] = body
            return 200, {"etag": '"1"'}, b""
        if token not in self.users:
            return _refused(401, "", "Invalid username or password.")
        said = json.loads(body) if body and "/commit/" not in path else {}
        if path == "/api/repos/create":
            user = self.users[token]
            name = f"{said.get('organization') or user}/{said['name']}"
            if said.get("organization") not in (None, user):
                return _refused(403, "", f"{user} may not make {name}")
            if name in self.repositories:
                return _json({"url": f"{self._base}/{name}"}, 409)
            self.repositories[name] = Repository(writer=token)
            return _json({"url": f"{self._base}/{name}"})
        name, repository = self._named(path.removeprefix("/api/models/").removeprefix("/"))
        if repository is None:
            return _refused(404, "RepoNotFound", "Repository not found")
        if repository.writer != token:
            return _refused(403, "", f"{self.users[token]} may not write to {name}")
        rest = path.removeprefix("/api/models/").removeprefix("/").removeprefix(name).strip("/").split("/")
        if rest[0] == "branch":
            repository.branch = rest[1]
            return _json({})
        if rest[0] == "preupload":
            return _json({"files": [_upload_mode(file) for file in said["files"]]})
        if rest[0] == ".git":
            return _json({"objects": [self._batch(one) for one in said["objects"]]})
        if rest[0] == "commit" and rest[1] == repository.branch:
            return self._commit(name, repository, body)
        return _refused(404, "", f"no such route: {path}")

    def _batch(self, wanted: dict[str, Any]) -> dict[str, Any]:
        href = f"{self._base}/blobs/{wanted['oid']}"
        return {**wanted, "actions": {"upload": {"href": href}}}

    def _commit(self, name: str, repository: Repository, body: bytes) -> Answer:
        tree = dict(repository.files)
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    summary = value["summary"]
                case "file":
                    tree[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    data = self._blobs.get(value["oid"], b"")
                    if hashlib.sha256(data).hexdigest() != value["oid"]:
                        return _refused(400, "", f"the LFS object of {value['path']} is not here")
                    tree[value["path"]] = data
                case other:
                    return _refused(400, "", f"this hub knows no {other}")
        repository.commits.append(tree)
        repository.messages.append(summary)
        return _json(
            {"commitUrl": f"{self._base}/{name}/commit/{repository.sha}", "commitOid": repository.sha}
        )


def _upload_mode(file: dict[str, Any]) -> dict[str, Any]:
    large = file["size"] > REGULAR_BYTES or file["path"].endswith(".safetensors")
    return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
