"""Connectors against real local servers and file systems."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import fsspec
import pytest
import trio
from fsspec.implementations.memory import MemoryFileSystem
from tests.support.hub import Answer, Hub, Repository, http_server

from hypha.config.models import RESERVED_CIDR, AllowConfig
from hypha.errors import Refused, TransferFailed
from hypha.messages import HuggingFace
from hypha.worker.fetch.allowance import Allowance
from hypha.worker.fetch.connectors import fetch_hub, fetch_uri
from hypha.worker.fetch.local import fetch_local, safe_name


def allowance(max_bytes: int = 10_000, **lists: list[str]) -> Allowance:
    return Allowance(AllowConfig.model_validate({"max-file-gb": max_bytes / 1e9, **lists}))


def text_of(paths: list[Path]) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in paths}


def files_in(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


# --- http(s) -------------------------------------------------------------------------------------------


async def test_uri_is_saved_under_its_name(tmp_path: Path) -> None:
    with http_server(lambda request: (200, {}, request.path.encode())) as base:
        paths = await fetch_uri(f"{base}/models/a.bin?x=1", tmp_path, allowance(uri=[f"{base}/*"]))
    assert text_of(paths) == {"a.bin": b"/models/a.bin?x=1"}
    assert paths[0].stat().st_mode & 0o777 == 0o600


async def test_redirects_are_checked_again(tmp_path: Path) -> None:
    secret = pytest.fail

    def answer(request: BaseHTTPRequestHandler) -> Answer:
        if request.path == "/private":
            secret("fetched what is not allowed")
        goal = {"/public/a": "/public/b", "/public/evil": "/private", "/public/loop": "/public/loop"}
        if request.path in goal:
            return 302, {"location": goal[request.path]}, b""
        return 200, {}, b"fine"

    with http_server(answer) as base:
        rules = allowance(uri=[f"{base}/public/*"])
        assert text_of(await fetch_uri(f"{base}/public/a", tmp_path, rules)) == {"b": b"fine"}
        with pytest.raises(Refused, match=r"allow\.uri"):
            await fetch_uri(f"{base}/public/evil", tmp_path, rules)
        with pytest.raises(Refused, match="redirects"):
            await fetch_uri(f"{base}/public/loop", tmp_path, rules)


@pytest.mark.parametrize(
    "host",
    ["localhost", "127.1", "2130706433", "0x7f000001", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "[::]"],
)
async def test_what_stands_for_an_excluded_address_is_not_asked(tmp_path: Path, host: str) -> None:
    def answer(request: BaseHTTPRequestHandler) -> Answer:
        pytest.fail(f"{request.path} was fetched")

    with http_server(answer) as base:
        port = base.rpartition(":")[2]
        # a host that is no address of its own: what it stands for decides
        rules = Allowance(AllowConfig(uri=["*"]), RESERVED_CIDR)
        with pytest.raises(Refused, match="exclude_cidr"):
            await fetch_uri(f"http://{host}:{port}/secret", tmp_path, rules)


async def test_redirects_do_not_lead_into_excluded_networks(tmp_path: Path) -> None:
    def answer(request: BaseHTTPRequestHandler) -> Answer:
        port = request.server.server_port  # type: ignore[attr-defined]
        return 302, {"location": f"http://localhost:{port}/secret"}, b""

    with http_server(answer) as base:
        # the owner named the first address itself, so it may be asked; what it redirects to is another one
        rules = Allowance(AllowConfig(uri=[f"{base}/*", "http://localhost:*/*"]), RESERVED_CIDR)
        with pytest.raises(Refused, match=r"localhost is .*exclude_cidr"):
            await fetch_uri(f"{base}/public", tmp_path, rules)


async def test_a_name_is_asked_for_at_the_address_that_was_judged(tmp_path: Path) -> None:
    """Looked up a second time, a name could lead elsewhere."""
    with http_server(lambda request: (200, {}, request.headers["host"].encode())) as base:
        port = base.rpartition(":")[2]
        rules = allowance(uri=[f"http://localhost:{port}/*"])
        (path,) = await fetch_uri(f"http://localhost:{port}/x", tmp_path, rules)
    assert path.read_text() == f"localhost:{port}"


async def test_size_limit_holds_with_and_without_an_announced_length(tmp_path: Path) -> None:
    chunked = b"7d0\r\n" + b"x" * 2000 + b"\r\n0\r\n\r\n"

    def answer(request: BaseHTTPRequestHandler) -> Answer:
        if request.path == "/announced":
            return 200, {}, b"x" * 2000
        return 200, {"transfer-encoding": "chunked"}, chunked

    with http_server(answer) as base:
        rules = allowance(1000, uri=[f"{base}/*"])
        with pytest.raises(Refused, match="2000 bytes"):
            await fetch_uri(f"{base}/announced", tmp_path, rules)
        with pytest.raises(Refused, match="more than"):
            await fetch_uri(f"{base}/chunked", tmp_path, rules)
    assert files_in(tmp_path) <= {"announced.part", "chunked.part"}


async def test_server_errors_are_tried_again_refusals_are_not(tmp_path: Path) -> None:
    asked: list[str] = []

    def answer(request: BaseHTTPRequestHandler) -> Answer:
        asked.append(request.path)
        if request.path == "/flaky" and asked.count("/flaky") < 3:
            return 503, {}, b""
        return (200, {}, b"ok") if request.path == "/flaky" else (404, {}, b"")

    with http_server(answer) as base:
        rules = allowance(uri=[f"{base}/*"])
        assert text_of(await fetch_uri(f"{base}/flaky", tmp_path, rules)) == {"flaky": b"ok"}
        with pytest.raises(Refused, match="404"):
            await fetch_uri(f"{base}/nothing", tmp_path, rules)
    assert asked.count("/nothing") == 1


async def test_cut_downloads_never_look_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypha.worker.fetch.connectors.HTTP_ATTEMPTS", 1)
    with http_server(lambda _: (200, {"content-length": "100"}, b"only a part")) as base:
        with pytest.raises(TransferFailed):
            await fetch_uri(f"{base}/file", tmp_path, allowance(uri=[f"{base}/*"]))
    assert not (tmp_path / "file").exists()


def test_names_from_outside_are_harmless() -> None:
    assert safe_name("/a/b.bin", "x") == "b.bin"
    for name in ("", "/", "/..", "/%2e%2e", "/a%2f..", "/a\\..", "/" + "x" * 300):
        assert safe_name(name, "x") in ("x", "a"), name


# --- Hugging Face hub ------------------------------------------------------------------------------------

FILES = {
    "config.json": b'{"a": 1}',
    "model.safetensors": b"w" * 500,
    "sub/vocab.txt": b"words",
    "x[1].txt": b"!",
}


@pytest.fixture
def hub() -> Iterator[tuple[Hub, str]]:
    repositories = {
        "acme/public": Repository([FILES]),
        "acme/private": Repository([FILES], writer="right", private=True),
        "acme/gated": Repository([FILES], gated=True),
    }
    pages = Hub(repositories)
    with pages.serve() as base:
        yield pages, base


async def test_hub_repository_in_one_state(
    tmp_path: Path, hub: tuple[Hub, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "the-owner's")
    pages, base = hub
    paths = await fetch_hub(HuggingFace(repository="acme/public"), tmp_path, 1000, base)
    assert {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in paths} == FILES
    assert files_in(tmp_path) == set(FILES)
    assert pages.tokens == {None}


async def test_hub_named_files_and_revision(tmp_path: Path, hub: tuple[Hub, str]) -> None:
    pages, base = hub
    sha = pages.repositories["acme/public"].sha
    wanted = HuggingFace(repository="acme/public", revision=sha, filenames=("config.json", "x[1].txt"))
    assert set(text_of(await fetch_hub(wanted, tmp_path, 1000, base))) == {"config.json", "x[1].txt"}
    assert not any("safetensors" in path for path in pages.asked)


async def test_hub_token_of_the_job(tmp_path: Path, hub: tuple[Hub, str]) -> None:
    pages, base = hub
    private = HuggingFace(repository="acme/private", token="right")
    assert len(await fetch_hub(private, tmp_path, 1000, base)) == len(FILES)
    assert pages.tokens == {"right"}


@pytest.mark.parametrize(
    ("reference", "code"),
    [
        (HuggingFace(repository="acme/private"), "not-found"),
        (HuggingFace(repository="acme/none"), "not-found"),
        (HuggingFace(repository="acme/public", revision="nope"), "not-found"),
        (HuggingFace(repository="acme/public", filenames=("nope",)), "not-found"),
        (HuggingFace(repository="acme/gated"), "not-allowed"),
        (HuggingFace(repository="../../etc"), "invalid"),
    ],
)
async def test_hub_refusals(tmp_path: Path, hub: tuple[Hub, str], reference: HuggingFace, code: str) -> None:
    with pytest.raises(Refused) as caught:
        await fetch_hub(reference, tmp_path, 1000, hub[1])
    assert caught.value.code == code


async def test_hub_size_limit_before_anything_is_loaded(tmp_path: Path, hub: tuple[Hub, str]) -> None:
    with pytest.raises(Refused, match=r"model\.safetensors"):
        await fetch_hub(HuggingFace(repository="acme/public"), tmp_path, 499, hub[1])
    assert not any("resolve" in path for path in hub[0].asked)


async def test_hub_that_is_down(tmp_path: Path) -> None:
    with pytest.raises(TransferFailed):
        await fetch_hub(HuggingFace(repository="acme/public"), tmp_path, 1000, "http://127.0.0.1:9")


# --- local and fsspec --------------------------------------------------------------------------------------


async def test_local_file_and_directory(tmp_path: Path) -> None:
    source = tmp_path / "model"
    (source / "sub").mkdir(parents=True)
    (source / "a").write_text("a")
    (source / "sub" / "b").write_text("b")
    rules = allowance(local_read=[f"{source}*"])
    (tmp_path / "1").mkdir()
    assert text_of(await fetch_local(f"file://{source}/a", tmp_path / "1", rules)) == {"a": b"a"}
    (tmp_path / "2").mkdir()
    assert text_of(await fetch_local(str(source), tmp_path / "2", rules)) == {"a": b"a", "b": b"b"}
    assert (tmp_path / "2" / "sub" / "b").exists()
    with pytest.raises(Refused, match="no file"):
        await fetch_local(f"{source}/nothing", tmp_path / "2", rules)
    with pytest.raises(Refused, match="more than"):
        await fetch_local(f"{source}/a", tmp_path / "2", allowance(0.5, local_read=["*"]))  # type: ignore[arg-type]


async def test_link_in_an_allowed_directory_is_no_way_out(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (tmp_path / "secret").write_text("x")
    (source / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "out").mkdir()
    with pytest.raises(Refused, match=r"allow\.local_read"):
        await fetch_local(str(source), tmp_path / "out", allowance(local_read=[str(source), f"{source}/*"]))
    assert list((tmp_path / "out").iterdir()) == []


async def test_what_was_judged_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that is put there once the path was found to be allowed leads nowhere."""
    source = tmp_path / "model"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "a").write_text("a")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a").write_text("the owner's")
    (tmp_path / "out").mkdir()
    rules = allowance(local_read=[f"{source}*"])
    judged = rules.read_local

    def judged_and_changed(url: str) -> Path | str:
        place = judged(url)
        if url.endswith("/a"):
            (source / "deep").rename(tmp_path / "gone")
            (source / "deep").symlink_to(tmp_path / "secret")
        return place

    monkeypatch.setattr(rules, "read_local", judged_and_changed)
    with pytest.raises(TransferFailed):
        await fetch_local(str(source), tmp_path / "out", rules)
    assert files_in(tmp_path / "out") == set()


async def test_fsspec_file_directory_limit_and_errors(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/worker-test/m/a": b"a", "/worker-test/m/sub/b": b"b" * 100})
    rules = allowance(50, local_read=["memory://worker-test/*", "nonsense://*"])
    (tmp_path / "1").mkdir()
    assert text_of(await fetch_local("memory://worker-test/m/a", tmp_path / "1", rules)) == {"a": b"a"}
    (tmp_path / "2").mkdir()
    with pytest.raises(Refused, match="more than"):
        await fetch_local("memory://worker-test/m", tmp_path / "2", rules)
    rules = allowance(local_read=["memory://worker-test/*", "nonsense://*"])
    (tmp_path / "3").mkdir()
    assert text_of(await fetch_local("memory://worker-test/m", tmp_path / "3", rules)) == {
        "a": b"a",
        "b": b"b" * 100,
    }
    assert (tmp_path / "3" / "sub" / "b").exists()
    with pytest.raises(Refused, match="nothing at"):
        await fetch_local("memory://worker-test/none", tmp_path / "3", rules)
    with pytest.raises(TransferFailed, match="nonsense"):
        await fetch_local("nonsense://x", tmp_path / "3", rules)


async def test_what_cannot_be_interrupted_leaves_the_workers_threads_alone(
    tmp_path: Path,
) -> None:
    """An executor asks, hangs up and asks again; what it asked for is silent."""
    silent, asked = threading.Event(), threading.Semaphore(0)

    class Silent(MemoryFileSystem):  # type: ignore[misc]
        protocol = "silent"

        def isfile(self, path: str) -> bool:
            asked.release()
            silent.wait(30)
            return False

    fsspec.register_implementation("silent", Silent, clobber=True)
    (tmp_path / "out").mkdir()
    rules, default = allowance(local_read=["silent://x/*"]), trio.to_thread.current_default_thread_limiter()
    try:
        for _ in range(3):
            with trio.move_on_after(0.05):
                await fetch_local("silent://x/y", tmp_path / "out", rules)
        assert default.borrowed_tokens == 0
    finally:
        silent.set()
    await trio.to_thread.run_sync(asked.acquire)


async def test_cancelled_copy_stops(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"x" * (64 << 20))
    (tmp_path / "out").mkdir()
    with trio.move_on_after(0.005) as scope:
        await fetch_local(str(tmp_path / "big"), tmp_path / "out", allowance(1 << 30, local_read=["*"]))
    assert scope.cancelled_caught
    assert not (tmp_path / "out" / "big").exists()
