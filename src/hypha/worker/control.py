"""What an operator asks of the worker that runs here: ``control.sock`` in its work directory.

A Unix socket, and not local HTTP: it is there whether or not ``http_address`` is set, no page of a browser
can reach it, and it needs no token, as who may use it is decided by the file system (the directory has mode
0700, the socket 0600: the worker's own user, and root). One line of JSON each way; a connection that was told
``leave`` stays open until the worker has ended.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec
import trio

from hypha.decoding import decode_json
from hypha.errors import HyphaError, Refused, Undecodable
from hypha.messages import Value
from hypha.worker.jobs.directory import MAX_SOCKET_PATH_BYTES
from hypha.worker.leasing.leaving import Leaving

logger = logging.getLogger(__name__)

_MAX_LINE_BYTES = 4096
#: A line is to be sent, and read, within this.
_LINE_S = 5.0


class Call(Value, frozen=True):
    """``drain``: make no more offers, what is leased goes on; ``resume``: make offers again; ``leave``: hand
    over what was trained, hand leases back, and end, all ``within_s``.
    """

    what: Literal["drain", "resume", "leave"]
    within_s: float = 0.0


class ControlReply(Value, frozen=True):
    """How the worker is now, in words; or why it did not do it. ``leases`` are those that go on."""

    state: str = ""
    leases: int = 0
    refused: str = ""


def socket_in(work_dir: Path) -> Path:
    return work_dir / "control.sock"


async def serve_control(
    work_dir: Path,
    leaving: Leaving,
    leases: Callable[[], int],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer until cancelled. Where there can be no socket that is logged, and nothing is answered."""
    path = socket_in(work_dir)
    try:
        listener = _bind(path)
    except OSError as exc:
        logger.warning("This worker cannot be drained by command: %s cannot be made (%s).", path, exc)
        task_status.started()
        return

    async def serve(stream: trio.SocketStream) -> None:
        try:
            with trio.fail_after(_LINE_S):
                line = b""
                while not line.endswith(b"\n") and len(line) <= _MAX_LINE_BYTES:
                    part = await stream.receive_some(_MAX_LINE_BYTES)
                    if not part:
                        break
                    line += part
            call = decode_json(line, Call)
            refused = ""
            try:
                match call:
                    case Call(what="drain"):
                        leaving.drain()
                    case Call(what="resume"):
                        leaving.resume()
                    case Call(within_s=within_s):
                        if not 0.0 < within_s < math.inf:
                            raise Refused("invalid", f"{within_s} is no time to leave within")
                        leaving.begin(within_s, "its operator drains it")
            except Refused as exc:
                refused = exc.reason
            answer = ControlReply(state=leaving.in_words, leases=leases(), refused=refused)
            with trio.fail_after(_LINE_S):
                await stream.send_all(msgspec.json.encode(answer) + b"\n")
            if call.what == "leave" and not refused:
                # closed by this process's end
                await trio.sleep_forever()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, Undecodable) as exc:
            logger.debug("A command broke off: %r", exc)
        finally:
            await trio.aclose_forcefully(stream)

    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, serve, [trio.SocketListener(listener)])
            task_status.started()
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def _reachable(path: Path) -> Iterator[str]:
    """``path`` as a socket can be bound to or connected to: a long one goes by its directory's descriptor."""
    if len(bytes(path)) <= MAX_SOCKET_PATH_BYTES:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def _bind(path: Path) -> trio.socket.SocketType:
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _reachable(path) as place:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
                other.settimeout(1.0)
                if other.connect_ex(place) == 0:
                    raise OSError("another worker with this work_dir listens there")
            # one that a killed worker left
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            bound.bind(place)
        path.chmod(0o600)
        bound.listen(8)
        return trio.socket.from_stdlib_socket(bound)
    except BaseException:
        bound.close()
        raise


def send_call(work_dir: Path, call: Call, wait_s: float = 0.0) -> tuple[ControlReply, bool]:
    """Send ``call`` to the worker of ``work_dir``; its answer, and whether it has ended, for which
    ``wait_s`` is waited. Blocks. Raises HyphaError where no worker listens.
    """
    path = socket_in(work_dir)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.settimeout(_LINE_S)
        try:
            with _reachable(path) as place:
                stream.connect(place)
            stream.sendall(msgspec.json.encode(call) + b"\n")
            with stream.makefile("rb") as lines:
                line = lines.readline(_MAX_LINE_BYTES)
                answer = decode_json(line, ControlReply)
                if wait_s and not answer.refused:
                    stream.settimeout(wait_s)
                    return answer, _ended(stream)
                return answer, False
        except PermissionError as exc:
            raise HyphaError(f"{path} is another user's: run this as the worker's user, or as root") from exc
        except FileNotFoundError as exc:
            raise HyphaError(
                f"no worker runs with the work directory {work_dir}: there is no {path}; name its "
                "configuration with --config"
            ) from exc
        except Undecodable as exc:
            raise HyphaError(f"what listens at {path} is no worker of this version: {exc}") from exc
        except OSError as exc:
            raise HyphaError(f"no worker answers at {path} ({exc}): it has ended, or hangs") from exc


def _ended(stream: socket.socket) -> bool:
    try:
        return stream.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True
