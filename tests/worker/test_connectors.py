"""Files of peers: the next peer where one fails, and no name that leaves the directory."""

from __future__ import annotations

import os
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import pytest
from blake3 import blake3
from tests.support.disks import small_disks
from tests.support.hub import Answer, http_server

from hypha.config.models import AllowConfig
from hypha.errors import PeerUnreachable, Refused, TransferFailed
from hypha.messages import (
    FileList,
    ListFiles,
    Local,
    PeerRef,
    Peers,
    PullFile,
    Request,
    Response,
    TransferMeta,
    Uri,
)
from hypha.worker.fetch.allowance import Allowance
from hypha.worker.fetch.connectors import Connectors

FILES = {"config.json": b"{}", "sub/vocab.txt": b"words"}
A, B = PeerRef(peer="a"), PeerRef(peer="b")


class Servers:
    """Peers that list and serve ``files``; ``troubles`` by peer and file name ("" for listing)."""

    def __init__(self, files: dict[str, bytes], prefix: str = "") -> None:
        self.files = files
        self.prefix = prefix
        self.troubles: dict[tuple[str, str], Exception] = {}
        self.pulled: list[tuple[str, str]] = []

    def meta(self, name: str, kind: str) -> TransferMeta:
        data = self.files[name]
        return TransferMeta(
            kind=kind, name=self.prefix + name, size=len(data), blake3=blake3(data).hexdigest()
        )

    async def ask(self, peer: PeerRef, request: Request, timeout_s: float = 10.0) -> Response:
        assert isinstance(request, ListFiles)
        if (peer.peer, "") in self.troubles:
            raise self.troubles[peer.peer, ""]
        return FileList(files=tuple(self.meta(name, request.kind) for name in self.files))

    async def pull(
        self, peer: PeerRef, what: PullFile, destination: Path, expect: TransferMeta | None, max_bytes: int
    ) -> TransferMeta:
        self.pulled.append((peer.peer, what.name))
        name = what.name.removeprefix(self.prefix)
        if (peer.peer, name) in self.troubles:
            raise self.troubles[peer.peer, name]
        assert expect == self.meta(name, what.kind)
        destination.write_bytes(self.files[name])
        return expect


async def fetch(
    servers: Servers, directory: Path, resource: str = "model", **limits: float
) -> dict[str, bytes]:
    rules = Allowance(AllowConfig.model_validate({"max_file_gb": 1.0, **limits}))
    connectors = Connectors(rules, SimpleNamespace(request=servers.ask, transfers=servers))  # type: ignore[arg-type]
    paths = await connectors.fetch(Peers(peers=(A, B), resource=resource), directory, "job")
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


async def test_all_files_of_a_directory(tmp_path: Path) -> None:
    servers = Servers(FILES)
    assert await fetch(servers, tmp_path) == FILES
    assert servers.pulled == [("a", "config.json"), ("a", "sub/vocab.txt")]


async def test_checkpoint_of_a_round(tmp_path: Path) -> None:
    servers = Servers(FILES, "12/")
    assert await fetch(servers, tmp_path, "checkpoint/12") == FILES
    assert servers.pulled[0] == ("a", "12/config.json")


async def test_next_peer_pulls_only_what_is_missing(tmp_path: Path) -> None:
    servers = Servers(FILES)
    servers.troubles["a", "sub/vocab.txt"] = TransferFailed("a", "sub/vocab.txt", "cut")
    assert await fetch(servers, tmp_path) == FILES
    assert servers.pulled == [("a", "config.json"), ("a", "sub/vocab.txt"), ("b", "sub/vocab.txt")]


async def test_no_peer_is_an_error(tmp_path: Path) -> None:
    servers = Servers(FILES)
    servers.troubles = {(peer, ""): PeerUnreachable(peer, "down") for peer in "ab"}
    with pytest.raises(PeerUnreachable):
        await fetch(servers, tmp_path)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "", "x\0"])
async def test_names_of_peers_are_not_trusted(tmp_path: Path, name: str) -> None:
    servers = Servers({name: b"x"})
    with pytest.raises(Refused) as caught:
        await fetch(servers, tmp_path)
    assert caught.value.code == "invalid"
    assert servers.pulled == []


async def test_size_limit_before_anything_is_pulled(tmp_path: Path) -> None:
    servers = Servers(FILES)
    with pytest.raises(Refused) as caught:
        await fetch(servers, tmp_path, max_file_gb=1e-9)
    assert caught.value.code == "too-large"
    assert servers.pulled == []


async def test_a_disk_that_is_full_is_told_as_such(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small disk")
    (tmp_path / "weights").write_bytes(bytes(3 << 20))
    with small_disks(tmp_path, "disk", megabytes=4) as (disk,), http_server(_weights) as base:
        rules = Allowance(AllowConfig(local_read=[f"{tmp_path}/*"], uri=[f"{base}/*"], max_file_gb=1.0))
        servers = Servers(FILES)
        connectors = Connectors(rules, SimpleNamespace(request=servers.ask, transfers=servers))  # type: ignore[arg-type]
        disk.fill()
        for reference in (Local(url=str(tmp_path / "weights")), Uri(value=f"{base}/weights")):
            with pytest.raises(Refused, match=r"make space on that disk: '.*disk/weights'") as caught:
                await connectors.fetch(reference, disk.path, "job")
            assert caught.value.code == "no-space"


def _weights(request: BaseHTTPRequestHandler) -> Answer:
    return 200, {}, bytes(500_000)
